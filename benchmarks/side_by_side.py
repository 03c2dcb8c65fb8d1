"""Runs of a study side by side, each on its share of the cores; ablate.py and transfer.py call it."""

import concurrent.futures
import os
import queue
import subprocess
import sys
import tempfile
import time


def done(points, jobs, work):
    """Yields (point, work(point, cores)) for each point as it is done; `jobs` points run at a time.

    cores: the set of the job's own cores.
    """
    slots = queue.SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))
    for slot in range(jobs):
        slots.put({core for i, core in enumerate(cores) if i % jobs == slot % len(cores)})

    def on_own_cores(point):
        mine = slots.get()
        try:
            return work(point, mine)
        finally:
            slots.put(mine)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(on_own_cores, point): point for point in points}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt:  # the runs also got the signal, and save
            pool.shutdown(cancel_futures=True)
            raise


def call(words, cores):
    """Runs `python -m words` on some cores.

    Returns:
      (the last line of its output if it failed, None if all went well; the share of these cores that it got).
    """
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # TensorFlow has a thread for each core it may use
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        share = (usage.ru_utime + usage.ru_stime) / (time.monotonic() - begun) / len(cores)
        last = (said.read().splitlines() or ["without a word"])[-1]
    return last if process.returncode else None, share


def failure(words, cores):
    """Returns the first value that `call` returns."""
    return call(words, cores)[0]
