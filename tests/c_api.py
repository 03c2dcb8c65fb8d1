"""Runs a SavedModel through TensorFlow's C API, which is how TF Serving loads one. Imports no TensorFlow.

    python c_api.py REQUEST.json INPUTS.npz OUTPUTS.npz

REQUEST.json: {"library": folder with libtensorflow_cc.so.2, "model": folder, "runs": [{"input": tensor's name,
"outputs": {name: tensor's name}}]}; run i feeds the array `i` of INPUTS.npz, and OUTPUTS.npz holds `i/name`.
"""

import ctypes
import json
import sys
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {1: np.float32, 4: np.uint8, 9: np.int64, 10: np.bool_}  # TF_DataType
CODES = {np.dtype(kind): code for code, kind in TYPES.items()}
STRING, TSTRING_SIZE = 7, 24


class Output(ctypes.Structure):
    _fields_ = [("operation", c_void_p), ("index", c_int)]


def load(folder):
    ctypes.CDLL(str(folder / "libtensorflow_framework.so.2"), ctypes.RTLD_GLOBAL)
    tf = ctypes.CDLL(str(folder / "libtensorflow_cc.so.2"))
    pointers = ("NewStatus", "NewGraph", "NewSessionOptions", "LoadSessionFromSavedModel", "GraphOperationByName",
                "AllocateTensor", "TensorData")  # fmt: skip
    for name in pointers:
        getattr(tf, f"TF_{name}").restype = c_void_p
    tf.TF_Message.restype = c_char_p
    tf.TF_Dim.restype = c_int64
    return tf


def main(request, inputs, outputs):
    request, arrays, results = json.loads(Path(request).read_text()), np.load(inputs), {}
    tf = load(Path(request["library"]))
    status, graph, options = c_void_p(tf.TF_NewStatus()), c_void_p(tf.TF_NewGraph()), tf.TF_NewSessionOptions()

    def check():
        if tf.TF_GetCode(status):
            sys.exit(tf.TF_Message(status).decode())

    tags = (c_char_p * 1)(b"serve")
    model = request["model"].encode()
    session = tf.TF_LoadSessionFromSavedModel(c_void_p(options), None, model, tags, 1, graph, None, status)
    check()

    def output(tensor):
        name, index = tensor.split(":")
        return Output(tf.TF_GraphOperationByName(graph, name.encode()), int(index))

    def tensor_of(array):
        dims = (c_int64 * array.ndim)(*array.shape)
        if array.dtype.kind == "S":
            tensor = tf.TF_AllocateTensor(STRING, dims, array.ndim, c_size_t(TSTRING_SIZE * array.size))
            for i, text in enumerate(array):
                place = c_void_p(tf.TF_TensorData(c_void_p(tensor)) + TSTRING_SIZE * i)
                tf.TF_StringInit(place)
                tf.TF_StringCopy(place, c_char_p(bytes(text)), c_size_t(len(text)))
            return tensor
        tensor = tf.TF_AllocateTensor(CODES[array.dtype], dims, array.ndim, c_size_t(array.nbytes))
        ctypes.memmove(tf.TF_TensorData(c_void_p(tensor)), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return tensor

    def array_of(tensor):
        tensor = c_void_p(tensor)
        shape = [tf.TF_Dim(tensor, i) for i in range(tf.TF_NumDims(tensor))]
        array = np.empty(shape, TYPES[tf.TF_TensorType(tensor)])
        ctypes.memmove(array.ctypes.data, tf.TF_TensorData(tensor), array.nbytes)
        return array

    for i, run in enumerate(request["runs"]):
        names = list(run["outputs"])
        wanted = (Output * len(names))(*(output(run["outputs"][name]) for name in names))
        found = (c_void_p * len(names))()
        feed = (c_void_p * 1)(tensor_of(arrays[str(i)]))
        source, number = byref(output(run["input"])), len(names)
        tf.TF_SessionRun(c_void_p(session), None, source, feed, 1, wanted, found, number, None, 0, None, status)
        check()
        results |= {f"{i}/{name}": array_of(tensor) for name, tensor in zip(names, found, strict=True)}
    assert "tensorflow" not in sys.modules
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
