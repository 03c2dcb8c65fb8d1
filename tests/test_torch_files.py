"""PyTorch's files, read without PyTorch: what they hold, and what they may not do."""

import gc
import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from storms import checkpoints as storm

from moco_tf.pytorch import checkpoint_files
from moco_tf.pytorch.checkpoint_files import TorchFileError

FILES = Path(__file__).parent / "torch_files"
FORMATS = ("types_zip.pth", "types_legacy.pth")


@pytest.mark.parametrize("name", FORMATS)
def test_every_type_shape_stride_and_offset_is_read_from_both_formats(name):
    found = checkpoint_files.read(FILES / name)
    expected = {  # as make_torch_fixtures.py wrote them
        "float32": np.arange(6, dtype="float32").reshape(2, 3).T,
        "float64": np.arange(2.0, 6.0),
        "float16": np.array([1.5, -2.25], "float16"),
        "bfloat16": np.array([1.5, -3.0e38], ml_dtypes.bfloat16),
        "int64": np.array(7),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 3), "float32"),
        "parameter": np.ones(2, "float32"),
    }
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value, strict=True)
        assert not found[key].flags.writeable


def test_safetensors_go_out_and_in_bit_for_bit(tmp_path):
    tensors = dict(checkpoint_files.read(FILES / "types_zip.pth"))
    checkpoint_files.write(tmp_path / "t.safetensors", tensors)
    again = checkpoint_files.read(tmp_path / "t.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (again[name].dtype, again[name].tobytes()) == (value.dtype, value.tobytes())
        assert not again[name].flags.writeable


# Files of attackers, written by Python's own pickle.

STORAGE = ("storage", "torch FloatStorage", "0", "cpu", 4)


class Asks:
    """Pickles as a call of a global by its name."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


def pickled(tree, protocol=2):
    """A pickle in which `Asks` stands for calls, and the tuple STORAGE for a tensor's persistent storage."""
    out = io.BytesIO()

    class Pickler(pickle._Pickler):  # the Python one: its parts can be called
        def save(self, thing, save_persistent_id=True):
            if isinstance(thing, Asks):
                module, _, attribute = thing.name.rpartition(".")
                self.write(f"c{module}\n{attribute}\n".encode())
                if thing.arguments != ("no call",):
                    super().save(thing.arguments)
                    self.write(b"R")
            elif isinstance(thing, tuple) and thing[:1] == ("storage",):
                self.write(b"(")
                for part in thing:
                    self.save(
                        Asks(part.replace(" ", "."), "no call") if isinstance(part, str) and " " in part else part
                    )
                self.write(b"tQ")
            else:
                super().save(thing, save_persistent_id)

    Pickler(out, protocol).dump(tree)
    return out.getvalue()


def tensor(storage=STORAGE, offset=0, size=(4,), stride=(1,)):
    return Asks("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, None)


def zip_file(path, data_pkl, data=bytes(16), compression=zipfile.ZIP_STORED, **entries):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/data/0", data)
        for name, value in entries.items():
            archive.writestr(f"archive/{name}", value)
    return path


def legacy_file(path, data_pkl, little_endian=True, keys=("0",)):
    head = [checkpoint_files.LEGACY_MAGIC, 1001, {"little_endian": little_endian, "type_sizes": {}}]
    path.write_bytes(
        b"".join(pickled(part) for part in head) + data_pkl + pickled(list(keys)) + struct.pack("<q", 4) + bytes(16)
    )
    return path


WRITERS = (zip_file, legacy_file)


@pytest.mark.parametrize("write", WRITERS)
def test_the_attackers_tools_write_files_that_are_read_where_they_are_harmless(write, tmp_path):
    path = write(tmp_path / "f.pth", pickled({"state_dict": {"w": tensor(size=(2, 2), stride=(2, 1))}, "epoch": 1}))
    np.testing.assert_array_equal(checkpoint_files.read(path)["w"], np.zeros((2, 2), "float32"), strict=True)


class Reduces:
    def __init__(self, *reduction):
        self.reduction = reduction

    def __reduce__(self):
        return self.reduction


MARKER = Path("/tmp") / f"moco_tf_hostile_{os.getpid()}"
HOSTILE = {
    "posix.system": Reduces(os.system, (f"touch {MARKER}",)),
    "builtins.eval": Asks("builtins.eval", f"open({str(MARKER)!r}, 'w')"),
    "__builtin__.exec": Reduces(exec, (f"open({str(MARKER)!r}, 'w')",)),  # Python 2's name of the module
    "builtins.getattr": Asks("builtins.getattr", Asks("torch.FloatStorage", "no call"), "__class__"),
    "subprocess.Popen": Asks("subprocess.Popen", ["touch", str(MARKER)]),
    "torch.load": Asks("torch.load", "other.pth"),
    "torch.hub.load": Asks("torch.hub.load", "other/repository", "model"),
    "torch.storage._load_from_bytes": Asks("torch.storage._load_from_bytes", pickle.dumps(1)),
    "torch._utils._rebuild_tensor_v2.__globals__": Asks("torch._utils._rebuild_tensor_v2.__globals__", "no call"),
    "numpy.core.multiarray.scalar": Asks("numpy.core.multiarray.scalar", 1),
    "argparse.Namespace": Asks("argparse.Namespace"),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_asks_for_anything_else_is_refused_with_the_name_it_asked_for(name, write, tmp_path):
    path = write(tmp_path / "f.pth", pickled({"state_dict": {"w": tensor()}, "extra": HOSTILE[name]}))
    with pytest.raises(TorchFileError) as refusal:
        checkpoint_files.read(path)
    assert str(refusal.value).startswith(f"{path}: refused: the pickle asks for '{name}'")
    assert "\n" not in str(refusal.value)
    assert not MARKER.exists()


def test_a_training_state_of_other_libraries_is_refused_with_the_way_out(tmp_path):
    buffer = Asks("mmengine.logging.history_buffer.HistoryBuffer")
    path = zip_file(tmp_path / "f.pth", pickled({"state_dict": {"w": tensor()}, "message_hub": {"loss": buffer}}))
    with pytest.raises(TorchFileError, match=r"HistoryBuffer', .*save its state_dict alone in PyTorch and bring that"):
        checkpoint_files.read(path)


def test_a_name_given_through_the_stack_is_refused_as_well(tmp_path):
    data = pickle.dumps(Reduces(os.system, ("true",)), protocol=4)
    assert b"\x93" in data  # STACK_GLOBAL
    with pytest.raises(TorchFileError, match=r"asks for 'posix\.system'"):
        checkpoint_files.read(zip_file(tmp_path / "f.pth", data))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x80\x02c__builtin__\ndict\n.", "asks for '__builtin__.dict'"),
        (b"\x80\x02}(U\x01aK\x01u}U\x01bK\x01sb.", None),  # attributes of a dict: taken and dropped
        (b"\x80\x02ctorch\nFloatStorage\n}U\x01bK\x01sb.", "sets attributes of an object"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls what is not a function"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "uses NEWOBJ"),
        (b"\x80\x02Pmy id\n.", "uses PERSID"),
        (pickle.dumps({2**64: 1}, 2), "a dict key of more than 64 bits"),  # hashing long ones takes minutes
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x02(i__builtin__\neval\n.", "uses INST"),
        (b"\x80\x02K\x01K\x02a.", "appends to what is not a list"),
        (b"\x80\x02}]K\x01s.", "a dict key that is a list"),
        (b"\x80\x02.", "damaged or cut-off pickle"),
        (b"\x80\x02u.", "damaged or cut-off pickle"),
        (b"\x80\x02h\x07.", "damaged or cut-off pickle"),
        (b"\x80\x02\xff.", "damaged or cut-off pickle"),
        (b"\x80\x02X\xff\xff\xff\x7fa", "damaged or cut-off pickle"),
        (b"", "damaged or cut-off pickle"),
        (b"\x80\x02U\x01xQ.", "a persistent object that is not a storage"),
    ],
)
def test_operations_that_tensors_do_not_need_are_refused(data, message, tmp_path):
    with pytest.raises(TorchFileError, match=message or "holds no state dict|not a tensor"):
        checkpoint_files.read(zip_file(tmp_path / "f.pth", data))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "value, message",
    [
        (tensor(size=(5,)), "beyond its storage of 4"),
        (tensor(offset=1), "beyond its storage of 4"),
        (tensor(size=(2, 2), stride=(4, 1)), "beyond its storage of 4"),
        (tensor(size=(1 << 40,), stride=(0,)), "beyond its storage of 4"),  # one number, a terabyte of copies
        (tensor(offset=-1), "none"),
        (tensor(stride=(-1,)), "none"),
        (tensor(offset=1 << 70), "none"),
        (tensor(size=(2, 2)), "2 sizes, 1 strides"),
        (tensor(size=(1,) * 40, stride=(1,) * 40), "40 sizes"),
        (tensor(size=(0, 1 << 40, 1 << 40), stride=(1, 1, 1)), "beyond its storage of 4"),
        (tensor(size=(1 << 40, 0, 1 << 40), stride=(0, 0, 0)), "beyond its storage of 4"),
        (tensor(size=(-1, -4), stride=(1, 1)), "none"),
        (tensor(storage="0"), "none"),
        (tensor(storage=("storage", "torch FloatStorage", "0", "cpu", -4)), "without type, key or length"),
        (tensor(storage=("storage", "torch FloatStorage", "0", "cpu", 1 << 60)), "without type, key or length"),
        (tensor(storage=("storage", "torch FloatStorage", "0", "cpu", 8)), "announced|no .* numbers"),
        (tensor(storage=("storage", "torch DoubleStorage", "0", "cpu", 4)), "announced|end of the file"),
        (tensor(storage=("storage", "torch FloatStorage", "../0", "cpu", 4)), "no entry|belongs to no tensor"),
        (tensor(storage=("storage", "torch FloatStorage", "0", "cpu", 4, ("1", 0, 4))), "is a view of another"),
        (Asks("torch._utils._rebuild_parameter", 1, True, None), "it holds no tensor"),
        (1.0, "'w' in the state dict is a float, not a tensor|belongs to no tensor"),
        ({"deeper": tensor()}, "'w' in the state dict is a dict, not a tensor"),
    ],
)
def test_no_tensor_reaches_beyond_its_storage(write, value, message, tmp_path):
    with pytest.raises(TorchFileError, match=message):
        checkpoint_files.read(write(tmp_path / "f.pth", pickled({"state_dict": {"w": value}})))


def test_one_storage_has_one_type(tmp_path):
    other = tensor(storage=("storage", "torch IntStorage", "0", "cpu", 4))
    with pytest.raises(TorchFileError, match="storage '0' has two types or lengths"):
        checkpoint_files.read(zip_file(tmp_path / "f.pth", pickled({"a": tensor(), "b": other})))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path, data: zip_file(path, data, byteorder=b"big"), "big-endian"),
        (lambda path, data: legacy_file(path, data, little_endian=False), "big-endian"),
        (lambda path, data: zip_file(path, data, compression=zipfile.ZIP_DEFLATED), "a compressed zip archive"),
        (lambda path, data: path.write_bytes(data), "not one that torch.save wrote"),
        (lambda path, data: path.write_bytes(b""), "neither a PyTorch file nor a .safetensors file"),
        (lambda path, data: path.write_bytes(b"<!DOCTYPE html><html>"), "it begins with b'<!DOCTYPE'"),
        (lambda path, data: path.mkdir(), "Is a directory"),
        (lambda path, data: None, "No such file or directory"),
        (lambda path, data: zipfile.ZipFile(path, "w").writestr("readme", b""), "without PyTorch's data.pkl"),
        (lambda path, data: legacy_file(path, data, keys=("0", "1")), "storage '1' belongs to no tensor"),
        (lambda path, data: legacy_file(path, data, keys=()), "no storage '0'"),
        (lambda path, data: legacy_file(path, data, keys=(1,)), "no list of storages"),
        (lambda path, data: zip_file(path, pickled([])), "holds no state dict, but a list"),
        (lambda path, data: zip_file(path, pickled({})), "holds no state dict"),
        (lambda path, data: zip_file(path, pickled({"a\nb": tensor()})), r"'a\\nb' is not a tensor's name"),
    ],
)
def test_what_is_no_state_dict_ends_in_one_line_that_says_so(make, message, tmp_path):
    path = tmp_path / "f.pth"
    make(path, pickled({"w": tensor()}))
    with pytest.raises(TorchFileError, match=message) as refusal:
        checkpoint_files.read(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["types_zip.pth", "types_legacy.pth", "safetensors"])
def test_a_file_cut_off_or_damaged_anywhere_is_refused_or_read_never_worse(name, tmp_path):
    if name == "safetensors":
        whole = safetensors.numpy.save({"a": np.arange(5.0), "b": np.ones((2, 3), "float32")})
    else:
        whole = (FILES / name).read_bytes()
    path = tmp_path / "f.pth"

    def is_refused(data):
        path.write_bytes(data)
        try:
            checkpoint_files.read(path)
        except TorchFileError as refusal:
            assert "\n" not in str(refusal)
            return True
        return False

    assert all(is_refused(whole[:length]) for length in range(0, len(whole), 1 + len(whole) // 400))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(256)
        refused += is_refused(bytes(damaged))
    assert refused > 20


@pytest.mark.parametrize("length", [1 << 31, 1 << 62])
def test_a_length_that_lies_takes_no_memory(length, tmp_path):
    string = b"\x80\x02\x8d" + struct.pack("<Q", length) + b"short"
    for path in (zip_file(tmp_path / "z.pth", string), legacy_file(tmp_path / "l.pth", string)):
        tracemalloc.start()
        with pytest.raises(TorchFileError, match="damaged or cut-off pickle"):
            checkpoint_files.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1e7
        tracemalloc.stop()


BOMBS = {  # what a pickle repeats
    "dicts": b"}",
    "dicts with an item": b"}K\1Ns",
    "a memo": b"}\x94",
    "tuples in tuples": b"\x85",
    "one object again and again": b"h\xc8",
    "marks": b"(",
    "lists with an item": b"]K\1a",
    "tensors": b"h\xc9h\xcaR",
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_pickle_cannot_ask_for_much_memory(bomb, write, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "MAX_OPERATIONS", 2**14)
    arguments = pickled((STORAGE, 0, (4,), (1,), False, None))[2:-1]
    before = b"\x80\x02(]q\xc8ctorch._utils\n_rebuild_tensor_v2\nq\xc9" + arguments + b"q\xca]"
    path = write(tmp_path / "f.pth", before + BOMBS[bomb] * 2**15 + b".")
    tracemalloc.start()
    try:
        with pytest.raises(TorchFileError, match=r"has more than 16384 operations; .*save its state_dict alone"):
            checkpoint_files.read(path)
        most = tracemalloc.get_traced_memory()[1] - path.stat().st_size
    finally:
        tracemalloc.stop()
    assert most < 2**14 * 300 + 2e6  # with 2^20 operations, 0.3 GB


def test_what_describes_the_tensors_is_bounded_in_all_formats(tmp_path):
    most = checkpoint_files.MAX_DESCRIPTION
    text = b"\x80\x02X" + struct.pack("<I", most) + bytes(most) + b"."
    header = b"{" + b" " * most + b"}"
    (tmp_path / "header").write_bytes(struct.pack("<Q", len(header)) + header)
    with zipfile.ZipFile(tmp_path / "directory", "w") as archive:
        archive.writestr("archive/data.pkl", pickled({"w": tensor()}))
        for number in range(70):
            entry = zipfile.ZipInfo(f"archive/{number}")
            entry.comment = bytes(2**16 - 1)
            archive.writestr(entry, b"")
    for what, path in {
        "the pickle": zip_file(tmp_path / "zip", text),
        "the pickle ": legacy_file(tmp_path / "stream", text),
        "the directory": tmp_path / "directory",
        "the header": tmp_path / "header",
    }.items():
        with pytest.raises(TorchFileError, match=rf"refused: {what.strip()} of more than 4 MB; .*save its"):
            checkpoint_files.read(path)


def test_entries_of_an_archive_that_overlap_or_lie_beyond_it_are_refused(tmp_path):
    whole = zip_file(tmp_path / "f.pth", pickled({"w": tensor()})).read_bytes()
    place = whole.index(b"PK\1\2")
    for offset in (struct.pack("<I", 7), struct.pack("<I", 2**31), struct.pack("<I", len(whole))):
        (tmp_path / "f.pth").write_bytes(whole[: place + 42] + offset + whole[place + 46 :])
        with pytest.raises(TorchFileError, match="a damaged zip archive"):
            checkpoint_files.read(tmp_path / "f.pth")
    extra = struct.pack("<HHQQQ", 1, 24, 10, 10, 2**63)  # sizes and place in 64 bits
    fields = struct.pack("<HHHHHHIIIHHHHHII", 45, 45, 0, 0, 0, 0, 0, *[2**32 - 1] * 2, 16, 28, 0, 0, 0, 0, 2**32 - 1)
    directory = b"PK\1\2" + fields + b"archive/data.pkl" + extra
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(directory), place, 0)
    (tmp_path / "f.pth").write_bytes(whole[:place] + directory + b"PK\5\6" + end)
    with pytest.raises(TorchFileError, match=r"a damaged zip archive|claim more bytes"):
        checkpoint_files.read(tmp_path / "f.pth")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"dtype": "F32", "shape": [0, 1 << 40, 1 << 40], "data_offsets": [0, 0]}, "a shape that no tensor has"),
        ({"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}, "a shape that no tensor has"),
        ({"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 4]}, "a damaged"),
        ({"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}, "a damaged"),
        ({"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}, "is of type F8_E4M3; taken are"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "a damaged"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "a damaged"),
        ({"dtype": "F6\x7f", "shape": [1], "data_offsets": [0, 4]}, "a damaged"),
    ],
)
def test_no_array_of_safetensors_is_other_than_its_header_says(entry, message, tmp_path):
    header = json.dumps({"w": entry}).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + bytes(entry["data_offsets"][1]))
    with pytest.raises(TorchFileError, match=message) as refusal:
        checkpoint_files.read(tmp_path / "f")
    assert str(refusal.value).isprintable()


def test_a_storm_of_hostile_files_runs_no_code_and_ends_in_arrays_or_one_line():
    gc.collect()
    gc.disable()  # what other tests left behind is no doing of the reader's
    try:
        outcomes = storm.storm(2000, 1, storm.Guard())
    finally:
        gc.enable()
    assert outcomes["read"] > 300 and len(outcomes) > 15


def test_the_storm_notices_code_that_runs_arrays_beyond_their_file_and_messages_of_two_lines(tmp_path, monkeypatch):
    guard, path = storm.Guard(), str(tmp_path / "f")
    for read, message in {
        (lambda path: os.system("true")): "made the reader do this: os.system",
        (lambda path: open(tmp_path / "other", "w").close()): "made the reader do this: open",
        (lambda path: eval("1")): "made the reader do this: compile",
        (lambda path: {"w": np.zeros(9)}): "'w' has 72 bytes, its file 1",
    }.items():
        monkeypatch.setattr(checkpoint_files, "read", read)
        with pytest.raises(storm.Broken, match=message):
            storm.judge(path, b"x", guard)

    def refuse(path):
        raise TorchFileError(f"{path}: two\nlines")

    monkeypatch.setattr(checkpoint_files, "read", refuse)
    with pytest.raises(storm.Broken, match="not one short line"):
        storm.judge(path, b"x", guard)
    assert not (tmp_path / "other").exists()


def test_a_safetensors_file_that_lies_about_its_lengths_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(TorchFileError, match=r"a damaged \.safetensors file"):
        checkpoint_files.read(tmp_path / "f.safetensors")


def test_state_dicts_attributes_and_optimizers_are_no_obstacle(tmp_path):
    optimizer = {"state": {0: {"momentum_buffer": tensor()}}, "param_groups": [{"lr": 0.03, "params": [0, 1]}]}
    tree = OrderedDict(state_dict=OrderedDict(w=tensor()), optimizer=optimizer, arch="resnet50", best=None, x=1.5)
    data = pickled(tree, protocol=2)
    assert b"OrderedDict" in data
    assert list(checkpoint_files.read(zip_file(tmp_path / "f.pth", data))) == ["w"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("t.npz", "ends in .safetensors, .pth or .pt"),
        ("missing/t.safetensors", "there is no folder"),
        ("there.safetensors", "exists: choose another name"),
    ],
)
def test_a_file_is_never_written_over_nor_in_another_format(name, message, tmp_path):
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(TorchFileError, match=message):
        checkpoint_files.write(tmp_path / name, {"w": np.ones(2, "float32")})
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["there.safetensors"]
