"""The C++ structures that Python fills in, as ctypes has them."""

import ctypes

from llama_tp.native.library import DOUBLE, LONG, POINTER


class LayerArgs(ctypes.Structure):
    """What stays from step to step, as layer.cpp has it."""

    _fields_ = [
        *((name, POINTER) for name in ("attention_norm", "wqkv", "wo", "ffn_norm", "w13", "w2")),
        *((name, LONG) for name in ("D", "H", "K", "E", "F", "n_chunks")),
        ("eps", DOUBLE),
        ("communicator", POINTER),
        *((name, LONG) for name in ("tp", "rank", "wide")),
        ("timeout_s", DOUBLE),
    ]


class StepArgs(ctypes.Structure):
    """What stays from layer to layer."""

    _fields_ = [
        ("T", LONG),
        ("S", LONG),
        *((name, POINTER) for name in ("cos", "sin", "blocks", "offsets", "spans")),
        ("n_spans", LONG),
        ("tables", POINTER),
        ("complete", LONG),
    ]
