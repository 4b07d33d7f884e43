"""All layers of a step, each as one call of C++ (native/layer.cpp): the functions that
Transformer.layer_by_layer calls, in the same order and with the same bits.

Python takes 12 us for each of a layer's functions once a token's weights have swept it out of the
caches: 1.7 ms a token of the 1B, which takes 28 to 60.
"""

from ctypes import CDLL, addressof

import torch

from llama_tp.backends.base import (
    Elementwise,
    ForwardBatch,
    LayerShape,
    LayerWeights,
    Linear,
    Peers,
)
from llama_tp.backends.kv_cache import KVCache
from llama_tp.backends.linear.native import DTYPES, NativeLinear
from llama_tp.native.structs import LayerArgs, StepArgs


class NativeLayers:
    """A LayerRunner for NativeAttention's plans and cache.

    Args:
        library: the C++ library.
        shape: of every layer.
        deterministic: whether sums over the ranks are of fp32, in a fixed order.
        peers: with shared_sums where tp > 1.
        elementwise: for the norm behind the last layer.
        layers: their weights, NativeLinears among them.
        norm: (D,), the weight of the last norm.

    Raises TypeError for a Linear that is not in C++.
    """

    def __init__(
        self,
        library: CDLL,
        shape: LayerShape,
        deterministic: bool,
        peers: Peers,
        elementwise: Elementwise,
        layers: list[LayerWeights],
        norm: torch.Tensor,
    ):
        self.shape, self.peers, self.elementwise, self.norm = shape, peers, elementwise, norm
        self.layers = layers  # keeps what the pointers point to
        self._args = [layer_args(layer, shape, deterministic, peers) for layer in layers]
        self._late = peers.shared_sums.late if peers.shared_sums else "a layer has failed"
        self._call = getattr(library, f"layer_{DTYPES[norm.dtype]}")

    def __call__(
        self,
        x: torch.Tensor,
        batch: ForwardBatch,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache,
    ) -> torch.Tensor:
        (cos, sin), slots, plan = rotary, batch.slots, batch.plan
        delta = torch.empty_like(x)
        step = StepArgs(
            len(x),
            cache.block_size,
            cos.data_ptr(),
            sin.data_ptr(),
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
                raise RuntimeError(self._late)
        if self.peers.tp > 1:
            self.peers.count_collectives(2 * len(self._args))
        return self.elementwise.add_norm(x, delta, self.norm, self.shape.norm_eps)


def layer_args(
    layer: LayerWeights, shape: LayerShape, deterministic: bool, peers: Peers
) -> LayerArgs:
    """One layer as layer.cpp reads it. The tensors must outlive it."""
    place = (None, 1, 0, 0.0) if peers.shared_sums is None else peers.shared_sums.place
    communicator, tp, rank, timeout_s = place
    return LayerArgs(
        layer.attention_norm.data_ptr(),
        _address(layer.wqkv),
        _address(layer.wo),
        layer.ffn_norm.data_ptr(),
        _address(layer.w13),
        _address(layer.w2),
        shape.dim,
        shape.n_heads,
        shape.n_kv_heads,
        shape.head_dim,
        shape.ffn_dim,
        shape.wo_chunks,
        shape.norm_eps,
        communicator,
        tp,
        rank,
        deterministic,
        timeout_s,
    )


def _address(linear: Linear) -> int:
    if not isinstance(linear, NativeLinear):
        raise TypeError(f"{type(linear).__name__} is not a product in C++")
    return linear.weight.data_ptr()
