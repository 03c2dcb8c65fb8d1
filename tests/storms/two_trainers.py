"""python tests/storms/two_trainers.py: two trainers begin in one folder at once; one trains, the other stops.

The other says so in a line, and nothing is lost: the run ends with the bytes of an undisturbed one. `--flock=ENOLCK`:
on a file system that knows no locks, as some network file systems are. Prints a line for what does not
hold, and figures; status 1 if anything does not.
"""

import argparse
import concurrent.futures
import errno
import fcntl
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import zygote


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--flock", default="works", choices=("works", "ENOLCK", "ENOSYS"), help="what flock answers")
    settings = parser.parse_args()
    zygote.begin()
    begun, failed, stopped = time.monotonic(), 0, 0
    top = Path(tempfile.mkdtemp(prefix="storm-trainers-"))
    zygote.child(lambda: zygote.write_images(top / "images") or 0)
    whole = top / "whole"
    assert zygote.child(lambda: zygote.train(*zygote.arguments(top / "images", whole))).status == 0
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for number in range(settings.times):
            run = top / f"run-{number}"
            together = [pool.submit(one, top, run, settings.flock, time.time() + 0.2) for _ in range(2)]
            faults, refused = judge([each.result() for each in together], run, whole)
            for fault in faults:
                print(f"FAIL {number}: {fault}", flush=True)
            failed += bool(faults)
            stopped += refused
            shutil.rmtree(run)
    shutil.rmtree(top)
    print(
        f"{settings.times} times two trainers, flock {settings.flock}: {stopped} times one was told of the other, "
        f"{settings.times - stopped - failed} times it came when all was done; {failed} failed. "
        f"{time.monotonic() - begun:.0f} s."
    )
    return int(failed > 0)


def one(top, run, flock, moment):
    """A trainer that begins at a moment: an `Ended`."""

    def train():
        if flock != "works":

            def refuse(*_):
                raise OSError(getattr(errno, flock), os.strerror(getattr(errno, flock)))

            fcntl.flock = refuse
        time.sleep(max(0, moment - time.time()))
        return zygote.train(*zygote.arguments(top / "images", run))

    return zygote.child(train)


def judge(ended, run, whole):
    """(what does not hold, a list; whether one was refused)."""
    faults = [f"a traceback: {each.output}" for each in ended if "Traceback" in each.output]
    trained = [each for each in ended if each.status == 0 and "Done: step" in each.output]
    refused = [each for each in ended if each.status == 2 and "another process is training in" in each.output]
    late = [each for each in ended if each.status == 0 and "is finished, at step" in each.output]
    if (len(trained), len(refused) + len(late)) != (1, 1):
        tails = [f"{each.status}: {' | '.join(each.output.splitlines()[-3:])}" for each in ended]
        faults.append(f"one trains, and one says that it does; they ended so: {tails}")
    for each in refused:
        if len([line for line in each.output.splitlines() if "another process is training in" in line]) != 1:
            faults.append(f"more than a line: {each.output}")
    try:
        if zygote.files_of(run, zygote.LAST) != zygote.files_of(whole, zygote.LAST):
            faults.append("the last checkpoint differs")
        if zygote.rows(run) != zygote.rows(whole):
            faults.append(f"metrics.csv differs: {zygote.rows(run)}")
    except OSError as error:
        faults.append(f"something is lost: {error}")
    return faults, bool(refused)


if __name__ == "__main__":
    sys.exit(main())
