"""All layers of a step, each as one call of C++ (native/layer.cpp): the functions that
Transformer.layer_by_layer calls, in the same order and with the same bits.

Python takes 12 us for each of a layer's functions once a token's weights have swept it out of the
caches: 1.7 ms a token of the 1B, which takes 28 to 60.
"""

import torch

from llama_tp.backends.base import ForwardBatch, LayerShape, LayerWeights, Linear, Peers
from llama_tp.backends.kv_cache import KVCache
from llama_tp.backends.linear.native import NativeLinear
from llama_tp.native.calls import ALONE, Functions, Layers, LayerSizes, LayerTensors


class NativeLayers:
    """A LayerRunner for NativeAttention's plans and cache.

    Args:
        functions: the C++ library's, for the model's dtype.
        shape: of every layer; wo and w2 have as many chunks.
        deterministic: whether sums over the ranks are of fp32, in a fixed order.
        peers: with shared_sums where tp > 1.
        layers: their weights, NativeLinears among them.
        norm: (D,), the weight of the norm behind the last layer.

    Raises TypeError for a Linear that is not in C++.
    """

    def __init__(
        self,
        functions: Functions,
        shape: LayerShape,
        deterministic: bool,
        peers: Peers,
        layers: list[LayerWeights],
        norm: torch.Tensor,
    ):
        self.functions, self.peers, self.norm, self.eps = functions, peers, norm, shape.norm_eps
        sizes = LayerSizes(
            shape.n_heads,
            shape.n_kv_heads,
            shape.head_dim,
            shape.ffn_dim,
            shape.norm_eps,
            shape.wo_chunks,
            deterministic,
        )
        place = peers.shared_sums.place if peers.shared_sums else ALONE
        self.layers = Layers(functions, [_tensors(layer) for layer in layers], sizes, place)
        self.n_sums = 2 * len(layers) if peers.tp > 1 else 0
        self.late = peers.shared_sums.late if peers.shared_sums else "a layer has failed"

    def __call__(
        self,
        x: torch.Tensor,
        batch: ForwardBatch,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache,
    ) -> torch.Tensor:
        slots, plan = batch.slots, batch.plan
        step = self.layers.step(
            len(x),
            *rotary,
            slots.blocks,
            slots.offsets,
            plan.spans,
            plan.tables,
            plan.complete,
        )
        delta = self.layers(x, step, cache.layers)
        if delta is None:
            raise RuntimeError(self.late)
        self.peers.count_collectives(self.n_sums)
        return self.functions.add_norm(x, delta, self.norm, self.eps)


def _tensors(layer: LayerWeights) -> LayerTensors:
    return LayerTensors(
        layer.attention_norm,
        _packed(layer.wqkv),
        _packed(layer.wo),
        layer.ffn_norm,
        _packed(layer.w13),
        _packed(layer.w2),
    )


def _packed(linear: Linear) -> torch.Tensor:
    if not isinstance(linear, NativeLinear):
        raise TypeError(f"{type(linear).__name__} is not a product in C++")
    return linear.weight
