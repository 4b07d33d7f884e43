"""Loads the compiled library and declares its functions, so that wrong arguments end in Python and
not in memory.

Import torch first: the library's OpenMP is then the one that torch has loaded.
"""

import ctypes
import functools
import os

from llama_tp.native.build import path

POINTER, INT, LONG, FLOAT, DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)
_ROOM = [POINTER, INT, INT, DOUBLE]  # of shared.cpp: base, tp, rank, timeout_s

# name -> (result, arguments); a name that ends in _ stands for one function a dtype.
_FUNCTIONS = {
    "attend_": (
        None,
        [POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, POINTER, LONG, LONG, LONG, LONG],
    ),
    "add_norm_": (None, [POINTER, POINTER, POINTER, FLOAT, POINTER, LONG, LONG]),
    "rotate_write_": (None, [POINTER] * 7 + [LONG] * 5),
    "rotate_": (None, [POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG]),
    "write_kv_": (None, [POINTER, LONG, POINTER, LONG, *[POINTER] * 4, *[LONG] * 4]),
    "inputs_together_": (INT, []),
    "pack_": (None, [POINTER, LONG, LONG]),
    "product_": (None, [POINTER] * 4 + [LONG] * 4),
    "take_rows_": (ctypes.c_bool, [POINTER] * 3 + [LONG] * 3),
    "silu_mul_": (None, [POINTER, POINTER, LONG, LONG]),
    "layer_": (ctypes.c_bool, [POINTER] * 4 + [ctypes.c_bool] + [POINTER] * 2),
    "weights": (None, [POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG]),
    "weigh": (None, [POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG]),
    "read_all": (ctypes.c_uint64, [POINTER, LONG]),
    "shared_bytes": (LONG, [INT]),
    "shared_sum_": (ctypes.c_bool, [*_ROOM, POINTER, LONG]),
    "shared_gather": (ctypes.c_bool, [*_ROOM, POINTER, POINTER, LONG]),
    "shared_broadcast": (ctypes.c_bool, [*_ROOM, POINTER, LONG]),
}
DTYPE_NAMES = ("fp32", "bf16")


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None if it has not been built for this machine, or LLAMA_TP_NATIVE=0 turns it
    off."""
    if os.environ.get("LLAMA_TP_NATIVE") == "0" or not path().exists():
        return None
    library = ctypes.CDLL(str(path()))
    for name, (result, arguments) in _FUNCTIONS.items():
        for full in [name + dtype for dtype in DTYPE_NAMES] if name.endswith("_") else [name]:
            function = getattr(library, full)
            function.restype, function.argtypes = result, arguments
    return library
