"""Loads the compiled library, declares its functions, and holds what Python believes of it against
what it says of itself.

Import torch first: the library's OpenMP is then the one that torch has loaded.
"""

import ctypes
import functools
import os
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.native.build import path
from llama_tp.native.structs import DOUBLE, FLOAT, INT, LONG, POINTER, STRUCTS

BOOL, ULONG, TEXT = ctypes.c_bool, ctypes.c_uint64, ctypes.c_char_p
_CHANNEL = [POINTER, INT, INT, DOUBLE]  # of shared.cpp: base, tp, rank, timeout_s

# name -> (result, arguments); a name that ends in _ stands for one function a dtype.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "attend_": (
        None,
        [POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, POINTER, LONG, LONG, LONG, LONG],
    ),
    "add_norm_": (None, [POINTER, POINTER, POINTER, FLOAT, POINTER, LONG, LONG]),
    "rotate_": (None, [POINTER, LONG, POINTER, POINTER, LONG, LONG, LONG]),
    "write_kv_": (None, [POINTER, LONG, POINTER, LONG] + [POINTER] * 4 + [LONG] * 4),
    "silu_mul_": (None, [POINTER, POINTER, LONG, LONG]),
    "inputs_together_": (INT, []),
    "pack_": (None, [POINTER, LONG, LONG]),
    "take_rows_": (BOOL, [POINTER] * 3 + [LONG] * 3),
    "product_": (None, [POINTER] * 4 + [LONG] * 4),
    "layer_": (BOOL, [POINTER] * 4 + [BOOL] + [POINTER] * 2),
    "softmax_numerators": (None, [POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG]),
    "chunk_sums": (None, [POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG]),
    "read_all": (ULONG, [POINTER, LONG]),
    "shared_bytes": (LONG, [INT]),
    "shared_sum_": (BOOL, [*_CHANNEL, POINTER, LONG]),
    "shared_gather": (BOOL, [*_CHANNEL, POINTER, POINTER, LONG]),
    "shared_broadcast": (BOOL, [*_CHANNEL, POINTER, LONG]),
    "interface": (TEXT, []),
}
DTYPE_NAMES = ("fp32", "bf16")
WIDTH = 64  # outputs that a product computes together; packed weights have a multiple of them
MAX_RANKS = 64  # of one shared-memory channel

_TYPE_NAMES: dict[Any, str] = {  # as interface.cpp calls them
    None: "void",
    POINTER: "pointer",
    TEXT: "pointer",
    BOOL: "bool",
    INT: "int32",
    LONG: "int64",
    ULONG: "uint64",
    FLOAT: "float",
    DOUBLE: "double",
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None if it has not been built for this machine, or LLAMA_TP_NATIVE=0 turns it
    off. Raises UserError if it declares other structures or functions than this file and
    structs.py do."""
    if os.environ.get("LLAMA_TP_NATIVE") == "0" or not path().exists():
        return None
    library = ctypes.CDLL(str(path()))
    library.interface.restype = TEXT
    check(library.interface().decode())
    for name, (result, arguments) in _functions().items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def check(interface: str) -> None:
    """Compares the library's `interface` (see native.h) with Python's declarations.

    Raises UserError that names the first line that one side has and the other lacks.
    """
    theirs, ours = interface.splitlines(), declared()
    missing = [line for line in ours if line not in theirs]
    unknown = [line for line in theirs if line not in ours]
    if not missing and not unknown:
        return
    raise UserError(
        "the C++ library does not match its Python declarations",
        f"the library says {_first(unknown)}, Python says {_first(missing)}",
        "make native/native.h, interface.cpp, structs.py and library.py agree",
    )


def declared() -> list[str]:
    """What Python's side believes, in the words and the order of `interface`."""
    lines = []
    for struct in STRUCTS:
        name = struct.__name__
        lines.append(f"struct {name} {ctypes.sizeof(struct)}")
        lines += [
            f"field {name}.{field} {getattr(struct, field).offset} {_TYPE_NAMES[kind]}"
            for field, kind, *_ in struct._fields_
        ]
    lines += [
        " ".join(["function", name, *(_TYPE_NAMES[kind] for kind in (result, *arguments))])
        for name, (result, arguments) in _functions().items()
    ]
    return [*lines, f"constant WIDTH {WIDTH}", f"constant MAX_RANKS {MAX_RANKS}"]


def _functions() -> dict[str, tuple[Any, list[Any]]]:
    """Every exported function's full name -> (result, arguments)."""
    return {
        name + dtype if dtype else name: types
        for dtype in (*DTYPE_NAMES, "")
        for name, types in _FUNCTIONS.items()
        if name.endswith("_") == bool(dtype)
    }


def _first(lines: list[str]) -> str:
    return repr(lines[0]) if lines else "nothing of it"
