"""All layers of a step, each as one call of C++ (native/layer.cpp): the functions that
Transformer._one_by_one calls, in the same order and with the same bits.

Python takes 12 us for each of a layer's nine functions once a token's weights have swept it out of
the caches: 1.7 ms a token of the 1B, which takes 28 to 60.
"""

from ctypes import addressof

import torch

from llama_tp.model.kv_cache import KVCache
from llama_tp.model.layer import Batch, Layer
from llama_tp.model.matrix import DTYPES, NativeMatrix
from llama_tp.model.rope import Turn
from llama_tp.native.library import load
from llama_tp.native.structs import LayerArgs, StepArgs
from llama_tp.parallel.groups import Ranks
from llama_tp.parallel.shared_memory import SharedMemoryCommunicator


class NativeLayers:
    """Raises RuntimeError when the other ranks do not come to a sum in time."""

    def __init__(self, layers: list[Layer], ranks: Ranks):
        self.layers, self.ranks = layers, ranks  # also keeps what the pointers point to
        self._args = [layer_args(layer, ranks) for layer in layers]
        self._call = getattr(load(), f"layer_{DTYPES[layers[0].ffn_norm.weight.dtype]}")

    def __call__(self, x: torch.Tensor, batch: Batch, turn: Turn, cache: KVCache) -> torch.Tensor:
        """As Transformer._one_by_one."""
        slots, plan, delta = batch.slots, batch.plan, torch.empty_like(x)
        step = StepArgs(
            len(x),
            cache.block_size,
            turn.cos.data_ptr(),
            turn.sin.data_ptr(),
            slots.blocks.data_ptr(),
            slots.offsets.data_ptr(),
            plan.spans.buffer_info()[0],
            len(plan.spans) // 4,
            plan.tables.buffer_info()[0],
            plan.complete,
        )
        for i, (layer, (k, v)) in enumerate(zip(self._args, cache.layers)):
            if not self._call(
                addressof(layer),
                addressof(step),
                x.data_ptr(),
                delta.data_ptr(),
                i > 0,
                k.data_ptr(),
                v.data_ptr(),
            ):
                raise RuntimeError(self.ranks.communicator.late)
        if self.ranks.tp > 1:
            self.ranks.counters.collectives += 2 * len(self._args)
        return delta


def can_run(layers: list[Layer], ranks: Ranks) -> bool:
    """Whether all products of these layers are in C++, and their sums too."""
    linears = [
        linear
        for layer in layers
        for linear in (
            layer.attention.wqkv,
            layer.attention.wo,
            layer.feed_forward.w13,
            layer.feed_forward.w2,
        )
    ]
    return (ranks.tp == 1 or isinstance(ranks.communicator, SharedMemoryCommunicator)) and all(
        isinstance(linear.matrix, NativeMatrix) for linear in linears
    )


def layer_args(layer: Layer, ranks: Ranks) -> LayerArgs:
    attention, ffn = layer.attention, layer.feed_forward
    wqkv, wo, w13, w2 = (
        linear.matrix.weight.data_ptr()
        for linear in (attention.wqkv, attention.wo, ffn.w13, ffn.w2)
    )
    communicator, tp, rank, timeout_s = (
        ranks.communicator.place if ranks.tp > 1 else (None, 1, 0, 0.0)
    )
    return LayerArgs(
        layer.attention_norm.weight.data_ptr(),
        wqkv,
        wo,
        layer.ffn_norm.weight.data_ptr(),
        w13,
        w2,
        len(layer.ffn_norm.weight),
        attention.H,
        attention.K,
        attention.E,
        ffn.ffn,
        attention.wo.n_chunks,
        layer.ffn_norm.eps,
        communicator,
        tp,
        rank,
        attention.wo.deterministic,
        timeout_s,
    )
