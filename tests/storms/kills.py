"""python tests/storms/kills.py: SIGKILL at random moments of each method and task; all end as if nothing had been.

Each is run undisturbed, and then killed `--kills` times, and started again until it is done: by turns after a random
time (reading, checking files, compiling, a step, kNN) and before a random call that writes (a checkpoint, the end of
an epoch, the manifest). On one replica, on two of one machine, and as two machines, of which one is killed. The last
checkpoint (weights, queue, optimizer) has then the bytes of the undisturbed run's, metrics.csv its figures, and the
folder its files. Prints a line for each, and figures; status 1 if anything does not hold.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import zygote

METHODS = {
    "moco": [],
    "end_to_end": ["--method=end_to_end", "--shared=none"],
    "memory_bank": ["--method=memory_bank", "--loss=nce"],
    "moco_v3": ["--method=moco_v3"],
}
MACHINES = {"one replica": [], "two replicas": ["--virtual_replicas=2"], "two machines": []}
FOREVER = 3600  # seconds
NOTICED = 120  # seconds in which a machine notices that another is gone, or else is killed, as schedulers do


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=4, help="of each")
    parser.add_argument("--only", default="", help="those whose name begins so: 'moco on'")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=2)
    settings = parser.parse_args()
    zygote.begin()
    begun = time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="storm-kills-"))
    assert zygote.child(lambda: write_data(top)).status == 0
    with concurrent.futures.ProcessPoolExecutor(settings.jobs, multiprocessing.get_context("fork")) as pool:
        cases = [
            (top, name, words, machines, settings.kills, settings.seed)
            for name, words in pool.submit(all_words, top).result().items()
            for machines in MACHINES
            if f"{name} on {machines}".startswith(settings.only) and (machines != "two machines" or name == "moco")
        ]
        failed, kills = 0, {}
        for case, (moments, seconds, faults) in zip(cases, pool.map(killed_and_compared, cases), strict=True):
            name = f"{case[1]} on {case[3]}"
            for fault in faults:
                print(f"FAIL {name}, --seed={settings.seed}: {fault}", flush=True)
            failed += bool(faults)
            print(f"{'failed' if faults else 'ok'} {name}: killed {', '.join(moments)}; {seconds:.0f} s", flush=True)
            for moment in moments:
                kills[moment] = kills.get(moment, 0) + 1
    shutil.rmtree(top)
    where = ", ".join(f"{number} {moment}" for moment, number in sorted(kills.items()))
    seconds = time.monotonic() - begun
    print(f"{len(cases)} runs, {sum(kills.values())} kills ({where}): {failed} failed. {seconds:.0f} s.")
    return int(failed > 0)


def write_data(top):
    from tests import every_task

    every_task.write_data(top / "data")
    return 0


def all_words(top):
    """{a method's or a task's name: the flags of its run}; in a child, since some look at their data."""
    from tests import every_task

    named = {name: every_task.flags("crops", top / "data") + words for name, words in METHODS.items()}
    named |= {task: every_task.flags(task, top / "data") for task in every_task.TASKS if task != "crops"}
    monitored = ["--checkpoint_every=2", "--knn_every=1", "--eval_split=train", "--bn_groups=2"]
    return {name: [*words, *([] if "sentences" in words[1] else monitored)] for name, words in named.items()}


def killed_and_compared(case):
    """(the moments at which a run was killed, seconds, what does not hold)."""
    top, name, words, machines, kills, seed = case
    begun, draw = time.monotonic(), random.Random(f"{seed} {name} {machines}")
    place = top / f"{name}-{machines.replace(' ', '-')}"
    whole, run, moments = place / "whole", place / "run", []
    ended = start([*words, f"--run_dir={whole}"], machines, folder=whole)
    lasted, calls = time.monotonic() - begun, ended[0].calls
    if any(each.status for each in ended):
        return moments, lasted, [f"undisturbed: {tails(ended)}"]
    faults = []
    for number in range(kills):
        victim = draw.randrange(2) if machines == "two machines" else 0
        seconds, call = draw.uniform(0, lasted), draw.randrange(calls) + 1
        by_call = number % 2 and not victim  # the second machine writes nothing
        at = {"folder": run, "call": call} if by_call else {"seconds": seconds}
        ended = start([*words, f"--run_dir={run}"], machines, victim, **at)
        faults += [f"a traceback: {tails(ended)}"] if any("Traceback" in each.output for each in ended) else []
        if all(each.status == 0 for each in ended):
            break
        if ended[victim].status not in (None, -signal.SIGKILL):
            faults.append(f"ends by itself: {tails(ended)}")
        moments.append(stage(ended[victim].output))
    else:
        ended = start([*words, f"--run_dir={run}"], machines)
        if any(each.status for each in ended):
            faults.append(f"does not go on: {tails(ended)}")
    if not faults:
        faults += zygote.compare(run, whole, max(path.name for path in (whole / "checkpoints").iterdir()))
    shutil.rmtree(place)
    return moments, time.monotonic() - begun, faults


def start(words, machines, victim=0, folder="", call=0, seconds=FOREVER):
    """Runs the command, on two machines or one, the victim killed after some seconds or before a call: `Ended`s."""
    if machines != "two machines":
        words = [*words, *MACHINES[machines]]
        return [zygote.child(lambda: train(words), folder, call, code=0, timeout=seconds)]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    workers = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()

    def machine(index):
        def run():
            cluster = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            os.environ["TF_CONFIG"] = json.dumps(cluster)
            return train(words)

        if index == victim:
            return zygote.child(run, folder, call, code=0, timeout=seconds)
        return zygote.child(run, timeout=seconds + NOTICED)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # each waits for its child
        return list(pool.map(machine, range(2)))


def train(words):
    from moco_tf.encoders import vit
    from tests import every_task

    vit.vit_tiny = every_task.small_transformer
    return zygote.train(*words)


def stage(output):
    """When a run was killed, by what it had printed."""
    if call := re.findall(r"killed before (\w+) .*?/(\w+)[^/]*(?:/[^/]*)?$", output, re.M):
        return f"before {call[-1][0]} in {call[-1][1]}"
    return "after an epoch" if "Epoch" in output else "before an epoch's end"


def tails(ended):
    return [f"{each.status}: {' | '.join(each.output.splitlines()[-4:])}" for each in ended]


if __name__ == "__main__":
    sys.exit(main())
