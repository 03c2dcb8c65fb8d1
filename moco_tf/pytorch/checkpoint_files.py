"""Reads tensors from PyTorch's files, without PyTorch and without running code from a file; writes them.

There are three formats: the zip archive that `torch.save` writes today, the pickle stream that it wrote before
(PyTorch < 1.6; the early MoCo checkpoints), and safetensors. Both PyTorch formats contain a pickle, which can name any
Python callable. The small machine below reads pickles by itself. It knows tensors, containers and plain values,
refuses every other name, and imports nothing. In a file of tensors the description of the tensors is small, so its
size is bounded. This also bounds the memory that a hostile file can ask for. The numbers take as much memory as the
file has. Detectron2's .pkl is written only. `moco_tf.torch_weights` calls this module.
"""

import dataclasses
import io
import math
import os
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from moco_tf import files

DTYPES = {  # safetensors' names; all little-endian
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": ml_dtypes.bfloat16,
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
ENDINGS = {  # of the written files, by the library whose names the tensors have
    "pytorch": (".safetensors", ".pth", ".pt"),
    "detectron2": (".pkl", ".safetensors"),
}
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_DIMENSIONS = 16
MAX_NUMBERS = 2**48  # in a tensor or a storage: strides and offsets in bytes stay far from 2^63

# Limits of the tensors' description: a pickle, the directory of a zip archive, or the header of a .safetensors file.
# A tensor takes about 120 bytes and 31 operations of torch.save's pickle (measured in v2_zip.pth.tar of
# tests/torch_files).
MAX_DESCRIPTION = 4 * 2**20  # bytes
MAX_OPERATIONS = 2**20  # each adds at most one object to the stack, the memo and the containers

ALONE = "; where you trust the file, save its state_dict alone in PyTorch and bring that"


class TorchFileError(ValueError):
    """A file cannot be read or written. The message is one line; it names the file and the reason."""


def read(path):
    """Reads the state dict in a file: {name: NumPy array}, read-only, in the file's order and types.

    Takes a state dict as it is, or a dict that holds one under "state_dict" or "model". Ignores the other entries of
    such a dict (epoch, optimizer).

    Raises:
      TorchFileError: the file does not exist, has none of the three formats, is damaged, or asks for something that
        a file of tensors does not need.
    """
    try:
        with open(path, "rb") as file:
            tensors = _read(file)
        for name in tensors:
            if not name.isprintable():
                raise TorchFileError(f"{_short(name)} is not a tensor's name")
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from None
    except OSError as error:
        raise TorchFileError(f"{path}: {error.strerror or error}") from None
    return tensors


def write(path, tensors, to="pytorch"):
    """Writes {name: NumPy array} as a state dict: .safetensors, or .pth or .pt where PyTorch is installed.

    to: "detectron2" takes .safetensors, or the .pkl of Detectron2's model zoo.

    Raises:
      TorchFileError: the file exists, has another ending, or needs PyTorch, which is missing.
    """
    path = Path(path)
    check_writable(path, to)
    tensors = {
        name: np.array(value, order="C") for name, value in tensors.items()
    }  # safetensors writes an array's memory and ignores its strides
    try:
        with files.aside(path, replaces=False) as aside, open(aside, "wb") as file:
            if path.suffix == ".safetensors":
                file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
            elif path.suffix == ".pkl":
                contents = {"model": tensors, "__author__": "MOCO", "matching_heuristics": True}
                _ArrayPickler(file, protocol=5).dump(contents)  # older protocols have no bytes that NumPy may write to
            else:
                import torch

                torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, file)
    except FileExistsError:  # the file was made meanwhile
        raise _exists(path) from None
    except OSError as error:
        raise TorchFileError(f"{path}: {error.strerror or error}") from None


def check_writable(path, to="pytorch"):
    """Raises as `write` would, before the work whose result it writes."""
    path = Path(path)
    if path.suffix not in ENDINGS[to]:
        *others, last = ENDINGS[to]
        raise TorchFileError(f"{path}: a state dict is written to a file that ends in {', '.join(others)} or {last}")
    if path.exists() or path.is_symlink():
        raise _exists(path)
    if not path.parent.is_dir():
        raise TorchFileError(f"{path}: there is no folder {path.parent}")
    if path.suffix in (".pth", ".pt"):
        try:
            import torch  # noqa: F401
        except ImportError:
            raise TorchFileError(
                f"{path}: PyTorch writes this format and is not installed: pip install 'moco_tf[torch]', "
                "or let the name end in .safetensors"
            ) from None


class _ArrayPickler(pickle.Pickler):
    """Pickles arrays as calls of `numpy.ndarray`, the only name in the file.

    NumPy 2 would name a module that NumPy 1.23 does not have, and Detectron2 often runs with an old NumPy.
    """

    def reducer_override(self, value):
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


# These classes stand for a pickle's tensors; the numbers stay in the file until `array` loads them.


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    numel: int

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    size: tuple
    stride: tuple

    def array(self, load):
        dtype = self.storage.dtype
        strides = [s * dtype.itemsize for s in self.stride]
        return np.ndarray(self.size, dtype, load(self.storage), self.offset * dtype.itemsize, strides)


def _read(file):
    head = file.read(9)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        return _state_dict(*_read_zip(file, size))
    if head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < size:
        return _read_safetensors(file, struct.unpack("<Q", head[:8])[0])
    if head.startswith(b"\x80"):
        return _state_dict(*_read_legacy(file, size))
    raise TorchFileError(f"neither a PyTorch file nor a .safetensors file; it begins with {head!r}")


def _state_dict(tree, load):
    state_dict = tree
    for key in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(key), dict):
            state_dict = tree[key]
            break
    if not isinstance(state_dict, dict) or not state_dict:
        raise TorchFileError(f"holds no state dict, but a {type(state_dict).__name__}")
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise TorchFileError(f"{_short(name)} in the state dict is a {type(value).__name__}, not a tensor")
    return {name: value.array(load) for name, value in state_dict.items()}


def _read_safetensors(file, header):
    if header > MAX_DESCRIPTION:
        raise _too_large("the header")
    try:
        entries = safetensors.deserialize(file.read())
    except safetensors.SafetensorError as error:
        raise TorchFileError(f"a damaged .safetensors file: {files.printable(' '.join(str(error).split()))}") from None
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise TorchFileError(f"{_short(name)} is of type {entry['dtype']}; taken are {', '.join(DTYPES)}")
        if not _is_shape(entry["shape"]):
            raise TorchFileError(f"{_short(name)} has a shape that no tensor has: {_short(str(entry['shape']))}")
        arrays[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name].flags.writeable = False
    if not arrays:
        raise TorchFileError("holds no tensors")
    return arrays


def _read_zip(file, size):
    """Returns the unpickled tree of `torch.save`'s archive, and a function storage -> bytes."""
    faults = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)
    faults += (OverflowError, OSError)  # an offset beyond 2^63, or before the file
    bounded = _Bounded(file.raw)
    try:
        archive = zipfile.ZipFile(bounded)
    except TorchFileError:
        raise
    except faults as error:
        raise TorchFileError(f"a damaged zip archive: {_short(str(error))}") from None
    bounded.most = sys.maxsize  # for the entries: the code below checks their sizes
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise TorchFileError("a zip archive without PyTorch's data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise TorchFileError("a compressed zip archive; PyTorch stores its entries as they are")
    if sum(info.file_size for info in entries.values()) > size:
        raise TorchFileError("a damaged zip archive: its entries claim more bytes than the file has")

    def entry(name):
        if roots[0] + name not in entries:
            raise TorchFileError(f"a damaged zip archive: no entry {_short(name)}")
        try:
            return archive.read(entries[roots[0] + name])
        except faults as error:
            raise TorchFileError(f"a damaged zip archive: {_short(str(error))}") from None

    if roots[0] + "byteorder" in entries and entry("byteorder") != b"little":
        raise TorchFileError("written on a big-endian machine; only little-endian files are taken")

    kept = {}

    def load(storage):
        if storage.key not in kept:
            kept[storage.key] = entry(f"data/{storage.key}")
        length = len(kept[storage.key])
        if length != storage.nbytes:
            raise TorchFileError(
                f"a damaged file: storage {_short(storage.key)} has {length} bytes, {storage.nbytes} were announced"
            )
        return kept[storage.key]

    if entries[roots[0] + "data.pkl"].file_size > MAX_DESCRIPTION:
        raise _too_large("the pickle")
    return _Machine(io.BytesIO(entry("data.pkl"))).run(), load


class _Bounded(io.BufferedReader):
    """A file that gives at most `most` bytes per read, as zipfile reads the directory of an archive in one read."""

    most = MAX_DESCRIPTION

    def read(self, size=-1):
        if size > self.most:
            raise _too_large("the directory")
        return super().read(size)


def _read_legacy(file, size):
    """Returns the unpickled tree of the old format (five pickles, then numbers), and a function storage -> bytes."""

    def unpickled():
        """Returns the object that the next pickle describes, and the machine that read it."""
        start = file.tell()
        stream = io.BytesIO(file.read(MAX_DESCRIPTION + 1))  # its `read` takes no memory for a false length
        machine = _Machine(stream)
        try:
            tree = machine.run()
        except TorchFileError:
            if stream.tell() > MAX_DESCRIPTION:
                raise _too_large("the pickle") from None
            raise
        file.seek(start + stream.tell())
        return tree, machine

    def plain():
        return unpickled()[0]

    if plain() != LEGACY_MAGIC:
        raise TorchFileError("a pickle, but not one that torch.save wrote")
    protocol, system = plain(), plain()
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict):
        raise TorchFileError(f"written by an unknown version of torch.save, protocol {_short(protocol)}")
    if system.get("little_endian") is not True:
        raise TorchFileError("written on a big-endian machine; only little-endian files are taken")
    tree, machine = unpickled()
    keys = plain()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise TorchFileError("a damaged file: no list of storages after the pickle")
    places = {}
    for key in keys:
        if key not in machine.storages:
            raise TorchFileError(f"a damaged file: storage {_short(key)} belongs to no tensor")
        storage, count = machine.storages[key], file.read(8)
        if len(count) < 8 or struct.unpack("<q", count)[0] != storage.numel:
            raise TorchFileError(
                f"a damaged file: storage {_short(key)} has not the {storage.numel} numbers announced"
            )
        places[key] = file.tell()
        if places[key] + storage.nbytes > size:
            raise TorchFileError(f"cut off: storage {_short(key)} ends beyond the end of the file")
        file.seek(storage.nbytes, os.SEEK_CUR)
    kept = {}

    def load(storage):
        if storage.key not in places:
            raise TorchFileError(f"a damaged file: no storage {_short(storage.key)}")
        if storage.key not in kept:
            file.seek(places[storage.key])
            kept[storage.key] = file.read(storage.nbytes)
        return kept[storage.key]

    return tree, load


# The names that a pickle may ask for. The pickle calls a name's value (`Callable`) or passes it on (np.dtype).


def _ordered_dict():
    return {}


def _rebuild_tensor(storage, offset, size, stride, *_):
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or not all(map(_is_count, numbers)):
        raise TorchFileError("a damaged tensor: its storage, offset, size or stride is none")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise TorchFileError(f"a damaged tensor: {len(size)} sizes, {len(stride)} strides")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if last >= storage.numel or math.prod(size) > storage.numel or not _is_shape(size):
        raise TorchFileError(f"a damaged tensor: shape {size} reaches beyond its storage of {storage.numel} numbers")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor, *_):
    if not isinstance(tensor, _Tensor):
        raise TorchFileError("a damaged parameter: it holds no tensor")
    return tensor


NAMES = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
} | {name: np.dtype(DTYPES[code]) for name, code in STORAGES.items()}


_LITERALS = (  # operations that push their argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class _Machine:
    """Interprets one pickle from the position of `file` to the pickle's end; knows the operations that tensors need.

    `pickletools` splits the stream. The machine never looks up, imports or calls anything by a name from the file.
    """

    def __init__(self, file):
        self._file = file
        self._stack = []
        self._marks = []  # positions in the stack
        self._memo = {}
        self.storages = {}

    def run(self):
        """Returns the object that the pickle describes, with `_Tensor` in place of tensors."""
        try:
            for count, (operation, argument, _) in enumerate(pickletools.genops(self._file)):
                if count == MAX_OPERATIONS:
                    raise TorchFileError(f"refused: the pickle has more than {MAX_OPERATIONS} operations{ALONE}")
                if operation.name == "STOP":
                    return self._stack.pop()
                self._do(operation.name, argument)
        except TorchFileError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise TorchFileError(f"a damaged or cut-off pickle: {_short(str(error))}") from None
        raise TorchFileError("a cut-off pickle")

    def _do(self, name, argument):
        stack = self._stack
        if name in ("PROTO", "FRAME"):
            pass
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "LIST":
            stack.append(self._since_mark())
        elif name == "DICT":
            items = self._since_mark()
            stack.append({})
            self._set_items(items)
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._since_mark()
            if type(stack[-1]) is not list:
                raise TorchFileError("a damaged pickle: it appends to what is not a list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._since_mark()
            self._set_items(items)
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if type(module) is not str or type(attribute) is not str:
                raise TorchFileError("a damaged pickle: it asks for what is not a name")
            stack.append(_named(f"{module}.{attribute}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, Callable) or not isinstance(arguments, tuple):
                raise TorchFileError("a damaged pickle: it calls what is not a function")
            stack.append(function(*arguments))
        elif name == "BUILD":  # attributes of an OrderedDict: the `_metadata` of a state dict
            stack.pop()
            if type(stack[-1]) is not dict:
                raise TorchFileError("refused: the pickle sets attributes of an object")
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        else:
            raise TorchFileError(f"refused: the pickle uses {name}, which tensors have no need of")

    def _since_mark(self):
        place = self._marks.pop()
        items = self._stack[place:]
        del self._stack[place:]
        return items

    def _set_items(self, items):
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TorchFileError("a damaged pickle: it sets items of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float)):
                raise TorchFileError(f"refused: a dict key that is a {type(key).__name__}")
            if isinstance(key, int) and key.bit_length() > 64:  # hashing it takes time, and it may collide with others
                raise TorchFileError("refused: a dict key of more than 64 bits")
            target[key] = value

    def _storage(self, identity):
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise TorchFileError("a damaged pickle: a persistent object that is not a storage")
        _, dtype, key, _, numel, *view = identity
        if not (isinstance(dtype, np.dtype) and isinstance(key, str) and _is_count(numel)):
            raise TorchFileError("a damaged pickle: a storage without type, key or length")
        if view and view[0] is not None:
            raise TorchFileError(f"storage {_short(key)} is a view of another, as PyTorch before 0.4 had them")
        storage = _Storage(dtype, key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise TorchFileError(f"a damaged pickle: storage {_short(key)} has two types or lengths")
        return storage


def _named(name):
    if name not in NAMES:
        raise TorchFileError(f"refused: the pickle asks for {_short(name)}, which tensors have no need of{ALONE}")
    return NAMES[name]


def _is_count(number):
    return type(number) is int and 0 <= number < MAX_NUMBERS


def _is_shape(size):
    """Says whether an array can have these sizes; for (0, 2^40, 2^40) NumPy's product of the other two overflows."""
    return len(size) <= MAX_DIMENSIONS and math.prod(n or 1 for n in size) < MAX_NUMBERS


def _exists(path):
    return TorchFileError(f"{path} exists: choose another name, or delete it yourself")


def _too_large(what):
    return TorchFileError(f"refused: {what} of more than {MAX_DESCRIPTION >> 20} MB{ALONE}")


def _short(value):
    """Returns a value from the file as text that fits in one line of a message."""
    text = repr(value if isinstance(value, str) or _is_count(value) else type(value).__name__)
    return text if len(text) <= 100 else f"{text[:97]}..."
