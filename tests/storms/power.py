"""python tests/storms/power.py: the power goes at random moments of a run; nothing that was said to be saved is lost.

A run is recorded with the order of all that it does to its folder, and with every file that it makes. A moment of it
is drawn, and the disk that is then left is built: of a file as much as was synced, and of the rest a random part, cut
off or zeros; of what was done in a folder (files and folders made, renamed, removed) all that came before its last
sync, and of the rest, in its order, a random part. So a name can be there without its content, and content without
its name.

Each such disk must hold the checkpoint that was last said to be saved, byte for byte, none that bears a step's name
and is not whole, and the rows of metrics.csv up to it. Of some (`--restarts`) the same command must go on, and end
with the bytes of the undisturbed run. The run's own order is checked, too: a file gets its name after it was synced.
Prints a line for what does not hold, and figures; status 1 if anything does not.
"""

import argparse
import csv
import io
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import zygote

SAID = "saved "  # begins a word of the run's own in the log, before a step


class Node:
    """A file or folder as the run sees it; what of it is safe from a loss of power, and what was done since."""

    def __init__(self, number=None):
        self.number = number  # of the file in the stash; None: a folder
        self.size = self.synced = 0
        self.entries = {}  # of a folder: name -> Node
        self.safe = {}
        self.pending = []  # (name, Node or None) since the last sync; two of one name's change are one step

    def change(self, *steps):
        for name, node in steps:
            if node is None:
                self.entries.pop(name)
            else:
                self.entries[name] = node
        self.pending.append(steps)

    def sync(self, size):
        self.synced, self.safe, self.pending = size, dict(self.entries), []


class Disk:
    """A folder, and what a recorded run has done below it, call by call."""

    def __init__(self, folder):
        self.folder = folder
        self.root = Node()
        self.saved = 0  # the step of the newest checkpoint that was reported
        self.disorder = []  # files that got their names before they were synced

    def find(self, path):
        node = self.root
        for part in Path(path).relative_to(self.folder).parts:
            node = node.entries[part]
        return node

    def do(self, number, what, path, target, size):
        if what == "said":
            self.saved = int(path.removeprefix(SAID))
            return
        if what == "sync":
            self.find(path).sync(size)
            return
        place, name = self.find(Path(path).parent), Path(path).name
        if what == "create":
            place.change((name, Node(number)))
        elif what == "mkdir":
            place.change((name, Node()))
        elif what in ("unlink", "rmdir"):
            place.change((name, None))
        elif what == "rename":
            node, to = place.entries[name], Path(target)
            assert to.parent == Path(path).parent or "aside-" in str(to), "a move between folders"
            if "aside-" not in str(to):  # what is still written aside has no name yet
                self.check(node, target)
            if to.parent == Path(path).parent:
                place.change((name, None), (to.name, node))
            else:
                place.change((name, None))
                self.find(to.parent).change((to.name, node))
        elif what in ("write", "truncate", "allocate"):
            if name in place.entries:  # else it is removed and still open
                place.entries[name].size = size
        else:
            raise ValueError(f"what does {what} do?")

    def check(self, node, path):
        if node.number is not None and node.synced < node.size:
            self.disorder.append(path)
        if node.number is None and node.pending:
            self.disorder.append(path)
        for name, inside in node.entries.items():
            self.check(inside, f"{path}/{name}")

    def build(self, folder, stash, draw, node=None):
        """Writes what is left after a loss of power to a folder."""
        node = node or self.root
        if node.number is not None:
            keep = draw.randint(min(node.synced, node.size), max(node.synced, node.size))
            content = (stash / str(node.number)).read_bytes()
            zeros = draw.randint(0, max(node.size - keep, 0)) if draw.random() < 0.3 else 0  # room without content
            folder.write_bytes(content[:keep] + bytes(zeros))
            return
        folder.mkdir(exist_ok=True)
        entries = dict(node.safe)
        for steps in node.pending[: draw.randint(0, len(node.pending))]:
            for name, inside in steps:
                entries.pop(name, None) if inside is None else entries.update({name: inside})
        for name, inside in entries.items():
            self.build(folder / name, stash, draw, inside)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=10, help="of these disks the run goes on")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    zygote.begin()
    begun = time.monotonic()
    draw = random.Random(settings.seed)
    top = Path(tempfile.mkdtemp(prefix="storm-power-"))
    run, stash = top / "there/run", top / "stash"
    for folder in (run.parent, stash):
        folder.mkdir()
    zygote.child(lambda: zygote.write_images(top / "images") or 0)
    whole = zygote.child(lambda: train(top, run), run.parent, stash=stash)
    assert whole.status == 0, whole.output
    lines = [line.split("\t") for line in (stash / "log").read_text().splitlines()]
    calls = [(int(number), what, path, target, int(size)) for number, what, path, target, size in lines]
    content = final_content(calls, stash)
    moments = sorted(draw.sample(range(1, len(calls) + 1), min(settings.moments, len(calls))))
    restarts = set(draw.sample(moments, min(settings.restarts, len(moments))))
    failed = 0
    for moment in moments:
        disk = Disk(run.parent)
        for call in calls[:moment]:
            disk.do(*call)
        left = top / f"left-{moment}"
        disk.build(left, stash, draw)
        faults = missing(disk, left / run.name, content)
        if moment in restarts and not faults:
            faults = goes_on(top, left / run.name, run)
        for fault in faults:
            print(f"FAIL after call {moment} ({' '.join(calls[moment - 1][1:3])}): {fault}", flush=True)
        failed += bool(faults)
        shutil.rmtree(left)
    disk = Disk(run.parent)
    for call in calls:
        disk.do(*call)
    for path in disk.disorder:
        print(f"FAIL {path} got its name before it was synced")
    shutil.rmtree(top)
    print(
        f"{len(moments)} moments of {len(calls)} calls, {len(restarts)} of them gone on with: {failed} failed; "
        f"{len(disk.disorder)} files named before they were synced. {time.monotonic() - begun:.0f} s."
    )
    return int(failed > 0 or bool(disk.disorder))


def train(top, run):
    """A run that notes in the log which step it has reported as saved."""
    from moco_tf.checkpoint import Checkpoints

    save, library = Checkpoints.save, zygote.disk()

    def noted(checkpoints):
        target = save(checkpoints)
        library.faults_note(f"{SAID}{checkpoints.model.steps_done}".encode())
        return target

    Checkpoints.save = noted
    return zygote.train(*zygote.arguments(top / "images", run))


def final_content(calls, stash):
    """{name of a checkpoint: {name of a file: bytes}} of all checkpoints that the run has written."""
    content, names = {}, {}
    for number, what, path, target, _ in calls:
        if what == "create":
            names[path] = number
        elif what == "rename":
            moved = {name: n for name, n in names.items() if name == path or name.startswith(f"{path}/")}
            for name, n in moved.items():
                del names[name]
                names[target + name.removeprefix(path)] = n
            if Path(target).name.startswith("step-"):
                inside = {Path(name).name: n for name, n in names.items() if name.startswith(f"{target}/state.")}
                content[Path(target).name] = {name: (stash / str(n)).read_bytes() for name, n in inside.items()}
    return content


def missing(disk, run, content):
    """What a disk lacks of what was reported as saved; a list."""
    if not disk.saved:
        return []
    name = f"step-{disk.saved:09d}"
    try:
        if zygote.files_of(run, name) != content[name]:
            return [f"{name} was reported as saved and is harmed"]
    except FileNotFoundError as error:
        return [f"{name} was reported as saved and is gone: {error}"]
    faults = [
        f"{path.name} is harmed"
        for path in run.glob("checkpoints/step-*")
        if zygote.files_of(run, path.name) != content[path.name]
    ]
    text = (run / "metrics.csv").read_text() if (run / "metrics.csv").exists() else ""
    steps = [int(row["step"]) for row in csv.DictReader(io.StringIO(text))]
    wanted = list(range(zygote.STEPS // zygote.EPOCHS, disk.saved + 1, zygote.STEPS // zygote.EPOCHS))
    if steps[: len(wanted)] != wanted:
        faults.append(f"metrics.csv has rows of steps {steps}; {wanted} were written")
    return faults


def goes_on(top, run, whole):
    """What does not hold of the run that goes on with a disk; a list."""
    ended = zygote.child(lambda: zygote.train(*zygote.arguments(top / "images", run)))
    if ended.status != 0 or "Traceback" in ended.output:
        return [f"the same command ends with {ended.status}: {' | '.join(ended.output.splitlines()[-4:])}"]
    if zygote.files_of(run, zygote.LAST) != zygote.files_of(whole, zygote.LAST):
        return ["the last checkpoint differs"]
    if zygote.rows(run) != zygote.rows(whole):
        return ["metrics.csv differs"]
    return []


if __name__ == "__main__":
    sys.exit(main())
