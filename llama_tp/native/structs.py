"""The C++ structures that Python fills in, as ctypes has them. native.h says what the fields mean;
library.py compares sizes, offsets and types with the library's when it is loaded."""

import ctypes

POINTER, INT, LONG, FLOAT, DOUBLE = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_double,
)


class Span(ctypes.Structure):
    """One sequence in a step. Python writes spans as an array of int64, SPAN_INTS each."""

    _fields_ = [("row", LONG), ("start", LONG), ("n", LONG), ("table", LONG)]


class LayerArgs(ctypes.Structure):
    """What a layer keeps from step to step. Does not keep its tensors alive."""

    _fields_ = [
        ("attention_norm", POINTER),
        ("wqkv", POINTER),
        ("wo", POINTER),
        ("ffn_norm", POINTER),
        ("w13", POINTER),
        ("w2", POINTER),
        ("D", LONG),
        ("H", LONG),
        ("K", LONG),
        ("E", LONG),
        ("F", LONG),
        ("n_chunks", LONG),
        ("eps", DOUBLE),
        ("communicator", POINTER),
        ("tp", LONG),
        ("rank", LONG),
        ("fp32_sums", LONG),
        ("timeout_s", DOUBLE),
    ]


class StepArgs(ctypes.Structure):
    """What a step keeps from layer to layer.

    Attributes:
        owners: what the pointers point into, kept alive.
    """

    owners: tuple[object, ...] = ()
    _fields_ = [
        ("T", LONG),
        ("S", LONG),
        ("cos", POINTER),
        ("sin", POINTER),
        ("blocks", POINTER),
        ("offsets", POINTER),
        ("spans", POINTER),
        ("n_spans", LONG),
        ("tables", POINTER),
        ("complete", LONG),
    ]


STRUCTS = (Span, LayerArgs, StepArgs)  # in the order of interface.cpp
SPAN_INTS = len(Span._fields_)
