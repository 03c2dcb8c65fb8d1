"""python tests/storms/writes.py: each call of a run that writes is failed in turn; nothing whole may be harmed.

A tiny run is recorded; then it is begun anew for each of its calls, which fails: with ENOSPC that one and all after
it that need room (a full disk), with EROFS all after it (a disk that is taken away), with EIO that one alone. A run
must end by itself, without a traceback, with a line that says why, every checkpoint whole; the same command must then
end with the bytes of the undisturbed run. Prints a line for each, and figures; status 1 if anything does not hold.

--of=features, --of=search.build and --of=export.encoder do the same to the commands that use a finished run.
"""

import argparse
import concurrent.futures
import dataclasses
import errno
import hashlib
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zygote

WAYS = {"ENOSPC": (errno.ENOSPC, True), "EROFS": (errno.EROFS, True), "EIO": (errno.EIO, False)}
NOISE = ("Traceback", "Logging error", "Exception ignored", "Segmentation", "terminate called")
BUILT = re.compile(r"built-\d+")  # an index is built anew under the next number
LOGS = ("train.log", "log.txt")  # hold what the screen has; a run goes on without them
COMMANDS = {  # module and flags of what --of names; {images}, {whole} (a finished run) and {output} are folders
    "train": ("moco_tf.train", None),  # its flags: zygote.arguments
    "features": ("moco_tf.evaluate.features", ("--encoder={whole}", "--shard_size=10")),
    "search.build": ("moco_tf.search.build", ("--encoder={whole}", "--images={images}", "--shard_size=10")),
    "export.encoder": ("export.encoder", ("--run_dir={whole}",)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--of", choices=COMMANDS, default="train", help="the command whose writing fails")
    parser.add_argument("--every", type=int, default=1, help="fails every so many calls")
    parser.add_argument("--first", type=int, default=1, help="from this call on")
    parser.add_argument("--errors", default=",".join(WAYS), help=f"some of {', '.join(WAYS)}")
    parser.add_argument("--knn", action="store_true", help="train with the kNN monitor, which takes twice the time")
    parser.add_argument("--jobs", type=int, default=2)
    settings = parser.parse_args()
    zygote.begin()
    for module, _ in COMMANDS.values():
        importlib.import_module(module)
    begun = time.monotonic()
    top = Path(tempfile.mkdtemp(prefix="storm-writes-"))
    zygote.child(lambda: zygote.write_images(top / "images") or 0)
    (top / "stash").mkdir()
    storm = Storm(top, settings.of, ("--knn_every=1",) if settings.knn else ())
    if settings.of != "train":
        dataclasses.replace(storm, of="train").whole()
    whole = storm.whole(stash=top / "stash")
    numbers = range(settings.first, whole.calls + 1, settings.every)
    cases = [(name, number) for number in numbers for name in settings.errors.split(",")]
    ended = {}
    with concurrent.futures.ProcessPoolExecutor(settings.jobs, multiprocessing.get_context("fork")) as pool:
        for (name, number), (status, call, faults) in zip(cases, pool.map(storm, cases), strict=True):
            ended[status] = ended.get(status, 0) + 1
            for fault in faults:
                print(f"FAIL {name} at call {number} ({call}): {fault}", flush=True)
            if not faults:
                print(f"ok {name} at call {number} ({call}): status {status}", flush=True)
            ended["failed"] = ended.get("failed", 0) + bool(faults)
    shutil.rmtree(top)
    of = f"every {settings.every}. of " if settings.every > 1 else ""
    stopped = ended.get(1, 0) + ended.get(2, 0)
    print(
        f"{len(cases)} runs of {settings.of}: {of}{whole.calls} calls, {settings.errors}: {stopped} stopped in a line "
        f"and went on, {ended.get(0, 0)} ended as if nothing had been; {ended['failed']} failed. "
        f"{time.monotonic() - begun:.0f} s."
    )
    return int(ended["failed"] > 0)


@dataclasses.dataclass(frozen=True)
class Storm:
    """The runs of a command below a folder, `top`, which holds images and the undisturbed runs of each command."""

    top: Path
    of: str  # a key of COMMANDS
    more: tuple  # flags of training

    def whole(self, stash=""):
        """Runs the command undisturbed, which is what others are compared with; returns the `Ended`."""
        ended = self.run(self.top / f"whole-{self.of}", stash=stash)
        assert ended.status == 0, ended.output
        return ended

    def run(self, output, *failing, **how):
        """Runs the command with this folder of output in a child; failing, how: of `zygote.child`."""
        module, flags = COMMANDS[self.of]
        if self.of == "train":
            words = zygote.arguments(self.top / "images", output, *self.more)
        else:
            folders = {"whole": self.top / "whole-train", "images": self.top / "images"}
            words = [*(flag.format(**folders) for flag in flags), f"--output={output}"]
        return zygote.child(lambda: importlib.import_module(module).main(words), output, *failing, **how)

    def __call__(self, case):
        """Returns (status, the call that failed, what does not hold) of a run; case: error and failing call."""
        name, number = case
        code, all = WAYS[name]
        output = self.top / f"{name}-{number}"
        failed = self.run(output, number, code, all)
        faults = self.judge(failed, code, output)
        ended = failed
        if failed.status != 0:
            ended = self.run(output)
            if ended.status != 0 or any(noise in ended.output for noise in NOISE):
                faults.append(f"the same command ends with {ended.status}: {last(ended)}")
        if ended.status == 0:
            whole = self.top / f"whole-{self.of}"
            faults += zygote.compare(output, whole) if self.of == "train" else differences(output, whole)
        shutil.rmtree(output, ignore_errors=True)
        return failed.status, failed.call.replace(str(output), "OUTPUT"), faults

    def judge(self, failed, code, output):
        """Returns what does not hold of a run that met a failing call, a list."""
        faults = []
        begun = self.of != "train" or (output / "config.flags").exists()
        if failed.status not in (0, 1, 2) or (failed.status == 2 and begun):
            faults.append(f"status {failed.status}: {last(failed)}")
        if any(noise in failed.output for noise in NOISE):
            faults.append(f"more than a line: {last(failed)}")
        said = [line for line in failed.output.splitlines() if os.strerror(code) in line]
        if failed.status and len(said) != 1 + any(f"{log}: " in line for line in said for log in LOGS):
            faults.append(f"{len(said)} lines say why: {last(failed)}")
        known = {digest(path) for path in (self.top / "stash").iterdir()}
        finished = output.glob("checkpoints/step-*/*") if self.of == "train" else named(output).values()
        return faults + [f"{path} is harmed" for path in finished if path.is_dir() or digest(path) not in known]


def last(ended):
    """The last lines of what was printed."""
    return " | ".join(ended.output.splitlines()[-6:])


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def named(folder):
    """{path below the folder: path} of the files that have their final names, without logs."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file() and path.name not in LOGS}
    return {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}


def differences(output, whole):
    """Returns how the files of a command differ from those of the undisturbed one, a list."""
    names, wanted = (
        {BUILT.sub("built-N", str(name)): path for name, path in named(of).items()} for of in (output, whole)
    )
    if set(names) != set(wanted):
        return [f"other files: {sorted(set(names) ^ set(wanted))}"]
    found = [f"{name} differs" for name, path in names.items() if not alike(path, wanted[name])]
    for name in names:
        if name.endswith("saved_model.pb"):
            loaded = zygote.child(lambda: model_differs(names[name].parent, wanted[name].parent))  # noqa: B023
            found += [f"{name} differs: {last(loaded)}"] if loaded.status else []
    return found


def alike(path, other):
    """Says whether two files hold the same; of a SavedModel, whose bytes never repeat, see `model_differs`."""
    if path.suffix == ".npz":  # a run that goes on has other batches, whose last digits differ
        with np.load(path) as arrays, np.load(other) as others:
            return all(
                np.allclose(array, others[name], rtol=1e-5, atol=1e-6)
                if array.dtype == np.float32
                else np.array_equal(array, others[name])
                for name, array in arrays.items()
            )
    if path.suffix == ".json":
        return BUILT.sub("built-N", path.read_text()) == BUILT.sub("built-N", other.read_text())
    return path.suffix == ".pb" or path.parent.name == "variables" or digest(path) == digest(other)


def model_differs(folder, other):
    """Says whether two SavedModels compute different features of the same images."""
    import tensorflow as tf

    images = np.random.default_rng(0).integers(0, 256, (3, 9, 11, 3), np.uint8)
    found = [
        tf.saved_model.load(str(one)).signatures["serving_default"](images=tf.constant(images))["features"].numpy()
        for one in (folder, other)
    ]
    return int(not np.array_equal(*found))


if __name__ == "__main__":
    sys.exit(main())
