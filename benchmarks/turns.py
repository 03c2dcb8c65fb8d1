"""Times several ways to do one thing, which take turns, each in a process of its own.

The threads and memory of two libraries stay apart, and other work on the machine affects all ways equally.
"""

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

REST = 1  # seconds for the previous way to finish work that it had begun ahead


def take(commands, rounds):
    """Runs each command's function in turn, `rounds` times, after a first time that does not count.

    commands: {name: arguments for this Python}, of programs that end in `serve`.

    Returns:
      {name: [seconds of each round]}.
    """
    with contextlib.ExitStack() as stack:
        ways = {}
        for name, arguments in commands.items():
            ways[name] = process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            stack.callback(process.wait)
            stack.callback(process.stdin.close)  # ends the process
            _begin(process)  # the first compilations run side by side
        for name, process in ways.items():
            _seconds(process, name)
        seconds = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                time.sleep(REST)
                _begin(ways[name])
                seconds[name].append(_seconds(ways[name], name))
    return seconds


def _begin(process):
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")


def _seconds(process, name):
    for line in process.stdout:  # libraries may print, too
        if line.startswith("{"):
            return json.loads(line)["seconds"]
    raise SystemExit(f"{name} ended")


def serve(function):
    """Runs `function` for each input line, in a way's process, and answers with the seconds that it took."""
    for _ in sys.stdin:
        begin = time.perf_counter()
        function()
        print(json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


def gpu():
    """The name of the GPU that both libraries are to use, or None."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("-1", "") or not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True)
    return found.stdout.splitlines()[0] if found.returncode == 0 else None


def machine():
    """What steps run on: the GPU's name, or the number of cores and the processor's name."""
    if name := gpu():
        return name
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {(names or [platform.processor()])[0]}"


def ratio(slower, faster):
    """Median and quartiles of how many times as long `slower` took as `faster`, round by round."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
