"""python tests/storms/writes.py: each call of a run that writes is failed in turn; nothing whole may be harmed.

A tiny run is recorded; then it is begun anew for each of its calls, which fails: with ENOSPC that one and all after
it that need room (a full disk), with EROFS all after it (a disk that is taken away), with EIO that one alone. A run
must end by itself, without a traceback, with a line that says why, every checkpoint whole; the same command must then
end with the bytes of the undisturbed run. Prints a line for each, and figures; status 1 if anything does not hold.
"""

import argparse
import concurrent.futures
import errno
import hashlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import zygote

WAYS = {"ENOSPC": (errno.ENOSPC, True), "EROFS": (errno.EROFS, True), "EIO": (errno.EIO, False)}
NOISE = ("Traceback", "Logging error", "Exception ignored", "Segmentation", "terminate called")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="fails every so many calls")
    parser.add_argument("--first", type=int, default=1, help="from this call on")
    parser.add_argument("--errors", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--knn", action="store_true", help="with the kNN monitor, which takes twice the time")
    parser.add_argument("--jobs", type=int, default=2)
    settings = parser.parse_args()
    zygote.begin()
    begun = time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="storm-writes-"))
    words = ["--knn_every=1"] if settings.knn else []
    zygote.child(lambda: zygote.write_images(top / "images") or 0)
    (top / "stash").mkdir()
    whole = zygote.child(
        lambda: zygote.train(*zygote.arguments(top / "images", top / "whole", *words)),
        top / "whole",
        stash=top / "stash",
    )
    assert whole.status == 0, whole.output
    hashes = {digest(path) for path in (top / "stash").iterdir()}
    numbers = range(settings.first, whole.calls + 1, settings.every)
    cases = [(top, words, name, number, hashes) for number in numbers for name in settings.errors.split(",")]
    ended = {}
    with concurrent.futures.ProcessPoolExecutor(settings.jobs, multiprocessing.get_context("fork")) as pool:
        for (_, _, name, number, _), (status, call, faults) in zip(cases, pool.map(case, cases), strict=True):
            ended[status] = ended.get(status, 0) + 1
            for fault in faults:
                print(f"FAIL {name} at call {number} ({call}): {fault}", flush=True)
            if not faults:
                print(f"ok {name} at call {number} ({call}): status {status}", flush=True)
            ended["failed"] = ended.get("failed", 0) + bool(faults)
    shutil.rmtree(top)
    of = f"every {settings.every}. of " if settings.every > 1 else ""
    print(
        f"{len(cases)} runs: {of}{whole.calls} calls, {settings.errors}: {ended.get(1, 0) + ended.get(2, 0)} stopped "
        f"in a line and went on, {ended.get(0, 0)} ended as if nothing had been; {ended['failed']} failed. "
        f"{time.monotonic() - begun:.0f} s."
    )
    return int(ended["failed"] > 0)


def last(ended):
    """The last lines of what was printed."""
    return " | ".join(ended.output.splitlines()[-6:])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def case(arguments):
    """(status, the call that failed, what does not hold) of a run in which a call fails."""
    top, words, name, number, hashes = arguments
    code, all = WAYS[name]
    run = top / f"{name}-{number}"
    train = lambda: zygote.train(*zygote.arguments(top / "images", run, *words))  # noqa: E731
    failed = zygote.child(train, run, number, code, all)
    faults = judge(failed, code, run, hashes)
    ended = failed
    if failed.status != 0:
        ended = zygote.child(train, run)
        if ended.status != 0 or any(noise in ended.output for noise in NOISE):
            faults.append(f"the same command ends with {ended.status}: {last(ended)}")
    if ended.status == 0:
        faults += zygote.compare(run, top / "whole")
    shutil.rmtree(run, ignore_errors=True)
    return failed.status, failed.call.replace(str(run), "RUN"), faults


def judge(failed, code, run, hashes):
    """What does not hold of a run that met a failing call; a list."""
    faults = []
    if failed.status not in (0, 1, 2) or (failed.status == 2 and (run / "config.flags").exists()):
        faults.append(f"status {failed.status}: {last(failed)}")
    if any(noise in failed.output for noise in NOISE):
        faults.append(f"more than a line: {last(failed)}")
    said = [line for line in failed.output.splitlines() if os.strerror(code) in line]
    if failed.status and len(said) != 1 + any("train.log: " in line for line in said):
        faults.append(f"{len(said)} lines say why: {last(failed)}")
    faults += [f"{path} is harmed" for path in run.glob("checkpoints/step-*/*") if digest(path) not in hashes]
    return faults


if __name__ == "__main__":
    sys.exit(main())
