"""Where the weights of a checkpoint land: each in its rows of a matrix that several may share, and
who is told when one is complete."""

from collections import Counter

import torch

from llama_tp.arch.weight_format import FormatTensor
from llama_tp.arch.weights import Weight
from llama_tp.model.linear import ShardedWeight
from llama_tp.model.llama import Transformer

Place = tuple[ShardedWeight, int, int | None]  # first row, rows (None: all that follow)


class Destinations:
    """What a loader fills a model through: `view` before it reads a weight, `mark_loaded` behind.
    The two may run in different threads, each in one."""

    def __init__(self, model: Transformer):
        self.model, self._places = model, places(model)
        self._missing = Counter(id(module) for module, _, _ in self._places.values())

    def view(self, weight: Weight, tensor: FormatTensor) -> torch.Tensor:
        """The tensor that this rank's part of a weight's `tensor` is read into, padding included:
        `tensor.local_shape`, in the model's dtype, on its device. Today all weights are dense: each
        has one tensor."""
        module, start, n = self._places[weight.name]
        return module.destination(self.model.ranks.device, start, n)

    def mark_loaded(self, weight: Weight) -> None:
        """Tells the model that `weight` is complete. A matrix is laid out for its backend when its
        last part is there."""
        module = self._places[weight.name][0]
        self._missing[id(module)] -= 1
        if not self._missing[id(module)]:
            module.finish()
        if not any(self._missing.values()):
            self.model.weights_loaded()


def places(model: Transformer) -> dict[str, Place]:
    """Meta's name of each weight -> where it lies."""
    out: dict[str, Place] = {
        "tok_embeddings.weight": (model.tok_embeddings, 0, None),
        "norm.weight": (model.norm, 0, None),
    }
    if not model.config.tied:
        out["output.weight"] = (model.output, 0, None)
    for i, layer in enumerate(model.layers):
        attention, ffn = layer.attention, layer.feed_forward
        q, kv = attention.H * attention.E, attention.K * attention.E
        of_layer: dict[str, Place] = {
            "attention_norm": (layer.attention_norm, 0, None),
            "ffn_norm": (layer.ffn_norm, 0, None),
            "attention.wq": (attention.wqkv, 0, q),
            "attention.wk": (attention.wqkv, q, kv),
            "attention.wv": (attention.wqkv, q + kv, kv),
            "attention.wo": (attention.wo, 0, None),
            "feed_forward.w1": (ffn.w13, 0, ffn.F),
            "feed_forward.w3": (ffn.w13, ffn.F, ffn.F),
            "feed_forward.w2": (ffn.w2, 0, None),
        }
        out |= {f"layers.{i}.{name}.weight": place for name, place in of_layer.items()}
    return out
