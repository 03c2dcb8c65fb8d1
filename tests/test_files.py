"""Files are whole or absent, whatever ends their writing; names that are not text go into every file and library."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from filelock import SoftFileLock

from moco_tf import files
from moco_tf.command import ConfigError
from moco_tf.pytorch import checkpoint_files
from moco_tf.serving import saved_model

LATIN1 = os.fsdecode(b"m\xfcnchen")


def shown(folder):
    """The names that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_while_it_is_written_leaves_the_old_file_whole_and_nothing_else(tmp_path, error):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(error), files.aside(file) as writing:
        writing.write_text("new, in pa")
        raise error
    with pytest.raises(error), files.aside(tmp_path / "folder") as writing:
        (writing / "below").mkdir(parents=True)
        raise error
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_kill_while_writing_leaves_the_old_file_whole_and_shows_no_new_name(tmp_path):
    code = (
        "import os, signal, sys; from moco_tf import files\n"
        "with files.aside(sys.argv[1]) as writing, open(writing, 'w') as file:\n"
        "    file.write('new, in pa'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / name], cwd=Path(__file__).parent.parent, check=False
        )
        assert done.returncode == -signal.SIGKILL
    assert shown(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_before_all_goes_on(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("named") or replace(a, b))
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "token")
    writing = f".writing-{os.getpid()}-token"
    for write in (
        lambda path: files.write_text(path, "text"),
        lambda path: files.write_bytes(path, b"bytes"),
        lambda path: files.write_json(path, {}),
        lambda path: files.write_arrays(path, {"x": np.zeros(3)}),
    ):
        done.clear()
        write(tmp_path / "a")
        assert done == [writing, "named", tmp_path.name]
    done.clear()
    with files.aside(tmp_path / "b") as folder:
        folder.mkdir()
        (folder / "inside").write_text("")
    assert done == [writing, "inside", "named", tmp_path.name]


def test_a_file_is_written_aside_under_a_name_that_nobody_can_guess_and_as_long_as_its_own_may_be(tmp_path):
    names = set()
    for _ in range(8):
        with files.aside(tmp_path / ("x" * 250 + ".csv")) as writing:
            writing.write_text("")
            names.add(writing.name)
    assert len(names) == 8 and all(len(name) < 64 and name.endswith(".csv") for name in names)


def links_by_hand(*_):
    raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("link", [os.link, links_by_hand], ids=["links", "no links"])
def test_what_came_meanwhile_to_a_place_that_was_free_is_not_replaced(tmp_path, monkeypatch, link):
    monkeypatch.setattr(os, "link", link)
    with files.aside(tmp_path / "new", replaces=False) as writing:
        writing.write_text("new")
    assert (tmp_path / "new").read_text() == "new" and (tmp_path / "new").stat().st_nlink == 1
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for name in ("new", "nowhere"):
        with pytest.raises(FileExistsError), files.aside(tmp_path / name, replaces=False) as writing:
            writing.write_text("newer")
    assert (tmp_path / "new").read_text() == "new" and sorted(shown(tmp_path)) == ["new", "nowhere"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    for name in ("new", "nowhere", "full"):
        with pytest.raises(OSError), files.aside(tmp_path / name, replaces=False) as writing:
            writing.mkdir()
            (writing / "inside").write_text("")
    assert (tmp_path / "new").read_text() == "new" and (tmp_path / "full/mine").read_text() == "mine"
    assert not list(tmp_path.glob(".writing-*"))


def test_exports_and_weights_replace_nothing_that_came_while_they_were_made(tmp_path, monkeypatch):
    there = {name: tmp_path / name for name in ("w.safetensors", "encoder.onnx", "1")}
    save = safetensors.numpy.save
    monkeypatch.setattr(
        safetensors.numpy, "save", lambda *a, **k: there["w.safetensors"].write_text("mine") and save(*a, **k)
    )
    with pytest.raises(checkpoint_files.TorchFileError, match="exists: choose another name"):
        checkpoint_files.write(there["w.safetensors"], {"w": np.ones(2, "float32")})
    with pytest.raises(ConfigError, match="exists: choose another place"), saved_model.aside(there["1"]) as writing:
        writing.mkdir()
        there["1"].mkdir()
        (there["1"] / "mine").write_text("mine")
    with (
        pytest.raises(ConfigError, match="exists: choose another place"),
        saved_model.aside(there["encoder.onnx"]) as writing,
    ):
        writing.write_text("new")
        there["encoder.onnx"].write_text("mine")
    assert {path.read_text() for path in (there["w.safetensors"], there["encoder.onnx"], there["1"] / "mine")} == {
        "mine"
    }


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


HOLDS = """
import fcntl, sys
from moco_tf import files
def no_locks(*_):
    raise OSError(37, "No locks available")
if sys.argv[2] == "no locks":
    fcntl.flock = no_locks
lock = files.hold(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("system", ["locks", "no locks"])
def test_a_lock_is_one_processs_until_it_ends_however_it_does(tmp_path, monkeypatch, system):
    path = tmp_path / ".lock"
    path.write_text("kept")
    if system == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    command = [sys.executable, "-c", HOLDS, path, system]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(files.Held):
            files.hold(path)
        process.kill()
    lock = files.hold(path)
    with pytest.raises(files.Held):  # another part of this process
        files.hold(path)
    lock.close()
    lock.close()
    files.hold(path).close()
    assert path.read_text() == "kept" and os.listdir(tmp_path) == [".lock"]


def test_a_lock_is_not_followed_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("kept")
    for name in (".lock", ".lock-held"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        files.hold(tmp_path / ".lock")
    (tmp_path / ".lock").unlink()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(files.Held):
        files.hold(tmp_path / ".lock")
    assert (tmp_path / "precious").read_text() == "kept"


def test_where_another_machine_left_a_mark_the_refusal_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    mark = tmp_path / ".lock-held"
    with SoftFileLock(mark):
        lines = mark.read_text().splitlines()
    mark.write_text("\n".join([lines[0], "another-machine", *lines[2:]]) + "\n")
    with pytest.raises(files.Held, match=rf"or, where it ended on another machine, remove {mark}"):
        files.hold(tmp_path / ".lock")


def test_names_that_are_no_text_are_escaped_in_text_or_kept_byte_for_byte(tmp_path):
    files.write_text(tmp_path / "escaped", f"{LATIN1}\r\nä\n")
    assert (tmp_path / "escaped").read_bytes() == "m\\udcfcnchen\r\nä\n".encode()
    files.write_text(tmp_path / "kept", f"{LATIN1}\n", errors="surrogateescape")
    assert (tmp_path / "kept").read_bytes() == b"m\xfcnchen\n"


def test_json_holds_text_only_so_that_every_parser_takes_it(tmp_path):
    files.write_json(tmp_path / "a.json", {LATIN1: [LATIN1, ("猫", 1.5)], "none": float("nan")})
    found = json.loads((tmp_path / "a.json").read_bytes())
    assert found == {"m\\udcfcnchen": ["m\\udcfcnchen", ["猫", 1.5]], "none": None}
    json.dumps(found, ensure_ascii=False).encode()


def test_printable_names_keep_every_script_and_are_one_line():
    for name in ("猫\u3000犬", "می\u200cخو", "क\u094d\u200dष", "👩\u200d🔬", "no\u00a0break", "back\\slash"):
        assert files.printable(name) == name
    assert files.printable(f"{LATIN1}\n\r\x1b[0m\x85\u2028\0") == "m\\udcfcnchen\\n\\r\\x1b[0m\\x85\\u2028\\x00"
    assert files.printable("\u202egnp.exe \u2067a\u2069 שלום") == "\\u202egnp.exe \\u2067a\\u2069 שלום"


def test_tensorflow_is_given_text_that_leads_to_the_same_place(tmp_path, monkeypatch):
    assert files.for_tensorflow(tmp_path / "ä/b.keras") == str(tmp_path / "ä/b.keras")
    monkeypatch.chdir(tmp_path)
    folder = Path(LATIN1) / LATIN1
    folder.mkdir(parents=True)
    (folder / f"{LATIN1}.keras").write_text("x")
    for path in (folder, folder / "there.txt", folder / f"{LATIN1}.keras"):
        way = files.for_tensorflow(path)
        assert way.encode() and Path(way).suffix == path.suffix
        assert os.path.realpath(way) == os.path.realpath(path)
    checkpoint = tf.train.Checkpoint(value=tf.Variable(3.0))
    checkpoint.write(files.for_tensorflow(folder / "new/state"))
    assert (folder / "new/state.index").exists()
    checkpoint.value.assign(0.0)
    checkpoint.read(files.for_tensorflow(folder / "new/state")).assert_consumed()
    assert float(checkpoint.value) == 3


def test_a_way_for_tensorflow_is_made_anew_where_temporary_files_were_swept_and_goes_with_the_process(tmp_path):
    code = (
        "import os, sys; from moco_tf import files\n"
        "path = os.fsencode(sys.argv[1]) + b'/\\xfc'; os.mkdir(path)\n"
        "for _ in range(2):\n"
        "    way = files.for_tensorflow(os.fsdecode(path)); assert os.path.isdir(way); os.remove(way)\n"
        "assert files.for_tensorflow(os.fsdecode(path)) == files.for_tensorflow(os.fsdecode(path))\n"
        "print(os.path.exists(path))"
    )
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n" and list((tmp_path / "temporary").iterdir()) == []
    assert os.path.isdir(os.path.join(os.fsencode(tmp_path), b"\xfc"))


def test_a_folder_called_by_no_ascii_number_is_no_version(tmp_path):
    for name in ("2", "\u00b2", "\u0663"):
        (tmp_path / name).mkdir()
    assert saved_model.version_to_write(tmp_path).name == "3"
