"""Ways to do one thing, each in a process of its own, that take turns.

Neither threads nor memory of two libraries meet, and whatever else the machine does falls on all of them alike.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time

REST = 1  # seconds, in which what the way before had begun ahead comes to its end


def take(commands, rounds):
    """Runs each command's function in turn, `rounds` times, after a first time each that is reported apart.

    commands: {name: arguments of this Python}, programs that end in `serve`.

    Returns:
      {name: [seconds of each round]}, and {name: seconds of the first time}.
    """
    with contextlib.ExitStack() as stack:
        ways, first = {}, {}
        for name, arguments in commands.items():
            process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            stack.callback(process.wait)
            stack.callback(process.stdin.close)  # ends it
            ways[name], first[name] = process, _turn(process, name)
        seconds = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                seconds[name].append(_turn(ways[name], name))
    return seconds, first


def _turn(process, name):
    time.sleep(REST)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
    for line in process.stdout:  # libraries may print, too
        if line.startswith("{"):
            return json.loads(line)["seconds"]
    raise SystemExit(f"{name} ended")


def serve(function):
    """In the process: runs `function` for each line that comes in, and answers with the seconds that it took."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        function()
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def ratio(slower, faster):
    """Median and quartiles of how many times as long one took, round by round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(slower, faster, strict=True)], n=4)
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
