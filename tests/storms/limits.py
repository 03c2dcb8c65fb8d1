"""python tests/storms/limits.py: a run that may have too few open files, from none on; nothing whole is harmed.

A tiny run is begun with so many open files that it may have, one more each time, until several have gone through. It
must end by itself with a line that says why, or be ended by TensorFlow, which does so where it gets no thread and, at
one place, no file; the same command must then, without the limit, end with the bytes of the undisturbed run.
`--of=threads`: so many threads. Prints a line for each, and figures; status 1 if anything does not hold.
"""

import argparse
import concurrent.futures
import errno
import functools
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import zygote

LIMITS = {"files": resource.RLIMIT_NOFILE, "threads": resource.RLIMIT_NPROC}
SAYS = {"files": os.strerror(errno.EMFILE), "threads": "new thread"}
NOISE = ("Traceback", "Logging error", "Exception ignored", "Segmentation", "terminate called")
HANGS = 300  # seconds
ENOUGH = 5  # runs in a row that go through
NOBODY = 65534  # the system limits the threads of each user but root


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--of", choices=LIMITS, default="files")
    parser.add_argument("--first", type=int, default=1, help="the smallest limit")
    parser.add_argument("--jobs", type=int, default=2)
    settings = parser.parse_args()
    zygote.begin()
    begun = time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="storm-limits-"))
    zygote.child(lambda: zygote.write_images(top / "images") or 0)
    assert zygote.child(functools.partial(train, top, "whole")).status == 0
    ended, failed, numbers = [], 0, itertools.count(settings.first)
    with concurrent.futures.ProcessPoolExecutor(settings.jobs, multiprocessing.get_context("fork")) as pool:
        while ended[-ENOUGH:] != ENOUGH * [0]:
            some = list(itertools.islice(numbers, settings.jobs))
            of = functools.partial(limited_and_compared, top, settings.of)
            for number, (status, said, faults) in zip(some, pool.map(of, some), strict=True):
                for fault in faults:
                    print(f"FAIL {number} {settings.of}: {fault}", flush=True)
                if not faults:
                    print(f"ok {number} {settings.of}: status {status}: {said}", flush=True)
                ended.append(status)
                failed += bool(faults)
    shutil.rmtree(top)
    stopped, by_signal = ended.count(1) + ended.count(2), ended.count(-signal.SIGABRT)
    print(
        f"{len(ended)} runs with {settings.first} to {next(numbers) - 1} {settings.of}: {stopped} "
        f"stopped in a line and went on, {by_signal} ended by a signal and went on, {ended.count(0)} went through; "
        f"{failed} failed. {time.monotonic() - begun:.0f} s."
    )
    return int(failed > 0)


def train(top, name):
    return zygote.train(*zygote.arguments(top / "images", top / name))


def limited_and_compared(top, of, number):
    """(status, the last line, what does not hold) of a run that may have so many of something."""

    def limited():
        (top / name).mkdir()
        if of == "threads" and os.getuid() == 0:
            os.chown(top / name, NOBODY, NOBODY)
            os.chmod(top, 0o755)
            os.setuid(NOBODY)
        resource.setrlimit(LIMITS[of], (number, number))
        return train(top, name)

    name = f"{of}-{number}"
    failed = zygote.child(limited, timeout=HANGS)
    lines, faults = failed.output.splitlines(), []
    if failed.status not in (0, 1, 2, -signal.SIGABRT):
        faults.append(f"status {failed.status}: {' | '.join(lines[-6:])}")
    if any(noise in failed.output for noise in NOISE):
        faults.append(f"more than a line: {' | '.join(lines[-6:])}")
    if failed.status in (1, 2) and not any(SAYS[of] in line for line in lines):
        faults.append(f"no line says why: {' | '.join(lines[-6:])}")
    if failed.status != 0:
        ended = zygote.child(functools.partial(train, top, name))
        if ended.status != 0:
            faults.append(f"the same command ends with {ended.status}: {' | '.join(ended.output.splitlines()[-6:])}")
    if not faults:
        faults += zygote.compare(top / name, top / "whole")
    shutil.rmtree(top / name)
    return failed.status, lines[-1] if lines else "", faults


if __name__ == "__main__":
    sys.exit(main())
