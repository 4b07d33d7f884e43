"""The Llama transformer of one rank: its cut of every weight, and one forward pass over a step's
tokens.

Meta's structure and names (llama-models `model.py`), with wq/wk/wv fused into one product and w1/w3
into another. Two sums over the ranks a layer (after wo and after w2) and one after the embedding.
Tensor letters are sizes *on this rank*: T tokens in the step, D model dim, H query heads, K KV
heads, E head dim, F ffn dim, V vocab rows.
"""

import torch
import torch.nn.functional as F

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.shard_map import ShardMap
from llama_tp.arch.weights import Weight, table
from llama_tp.model.flash import Heads
from llama_tp.model.kernels import Kernels, pick
from llama_tp.model.kv_cache import KVCache
from llama_tp.model.layer import Batch, Layer, RMSNorm
from llama_tp.model.linear import (
    ColumnParallelLinear,
    ShardedMatrix,
    ShardedWeight,
    VocabParallelEmbedding,
)
from llama_tp.model.native_layers import NativeLayers, can_run
from llama_tp.model.rope import Rope, Turn
from llama_tp.parallel.groups import Ranks


def heads_of(config: ModelConfig, tp: int) -> Heads:
    """The heads of each rank."""
    return Heads(config.n_heads // tp, config.local_kv_heads(tp), config.head_dim)


class Transformer:
    """One rank's model. Built on the meta device; `into` and `loaded` are what the loader fills it
    through.

    Args:
        config: the whole model's sizes.
        ranks: this rank's place.
        dtype: of weights and activations.
        n_positions: longest sequence, for the rotary tables.
        deterministic: fixed summation order, bits that do not depend on the company, the chunking
            or tp.
        kernels: what to compute with; the fastest that there is unless given.
    """

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        n_positions: int,
        deterministic: bool = False,
        kernels: Kernels | None = None,
    ):
        self.config, self.ranks, self.dtype, self.deterministic = (
            config,
            ranks,
            dtype,
            deterministic,
        )
        self.kernels = kernels or pick(
            ranks.device, dtype, deterministic, heads_of(config, ranks.tp)
        )
        self.tok_embeddings = VocabParallelEmbedding(
            config.local_vocab(ranks.tp), config.dim, dtype, ranks, self.kernels, config.tied
        )
        self.layers = [
            Layer(config, ranks, dtype, deterministic, self.kernels) for _ in range(config.n_layers)
        ]
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.output = (
            self.tok_embeddings
            if config.tied
            else ColumnParallelLinear(config.dim, config.local_vocab(ranks.tp), dtype, self.kernels)
        )
        self.rope = Rope(config, n_positions, ranks.device)
        # Fewest rows a step must have for a row's bits not to depend on their number (1: it never
        # does, or no promise is made).
        self.rows_floor = 1
        self._in_one_call: NativeLayers | None = None  # does what _one_by_one does, where it can
        self._slots = self._table_of_slots()
        self._missing = {
            id(module): sum(m is module for m, _, _ in self._slots.values())
            for module, _, _ in self._slots.values()
        }

    # -------------------------------------------------------------------------------------- loading

    def _table_of_slots(self) -> dict[str, tuple[ShardedWeight, int, int | None]]:
        """name -> (module, first row, rows): where each weight of the table lands in the fused
        modules."""
        slots: dict[str, tuple[ShardedWeight, int, int | None]] = {
            "tok_embeddings.weight": (self.tok_embeddings, 0, None),
            "norm.weight": (self.norm, 0, None),
        }
        if not self.config.tied:
            slots["output.weight"] = (self.output, 0, None)
        for i, layer in enumerate(self.layers):
            attention, ffn = layer.attention, layer.feed_forward
            q, kv = attention.H * attention.E, attention.K * attention.E
            for name, slot in {
                "attention_norm": (layer.attention_norm, 0, None),
                "ffn_norm": (layer.ffn_norm, 0, None),
                "attention.wq": (attention.wqkv, 0, q),
                "attention.wk": (attention.wqkv, q, kv),
                "attention.wv": (attention.wqkv, q + kv, kv),
                "attention.wo": (attention.wo, 0, None),
                "feed_forward.w1": (ffn.w13, 0, ffn.ffn),
                "feed_forward.w3": (ffn.w13, ffn.ffn, ffn.ffn),
                "feed_forward.w2": (ffn.w2, 0, None),
            }.items():
                slots[f"layers.{i}.{name}.weight"] = slot
        return slots

    def into(self, weight: Weight) -> torch.Tensor:
        """The view that this rank's part of `weight` is read into."""
        module, start, n = self._slots[weight.name]
        return module.slot(self.ranks.device, start, n)

    def loaded(self, weight: Weight) -> None:
        """Tells the model that `weight` is complete; a fused matrix is packed when its last part
        is."""
        module = self._slots[weight.name][0]
        self._missing[id(module)] -= 1
        if not self._missing[id(module)]:
            module.finish()
            if self.deterministic and isinstance(module, ShardedMatrix) and module.multiplies:
                self.rows_floor = max(self.rows_floor, module.matrix.rows_floor)
        if not any(self._missing.values()) and can_run(self.layers, self.ranks):
            self._in_one_call = NativeLayers(self.layers, self.ranks)

    # -------------------------------------------------------------------------------------- forward

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """All tokens of a step through all layers. -> (T, D), normed, ready for `logits`."""
        turn = self.rope.at(batch.positions)
        x = self.tok_embeddings(batch.ids)  # (T, D)
        delta = (self._in_one_call or self._one_by_one)(x, batch, turn, cache)
        return self.kernels.add_norm(x, delta, self.norm.weight, self.norm.eps)

    def _one_by_one(
        self, x: torch.Tensor, batch: Batch, turn: Turn, cache: KVCache
    ) -> torch.Tensor:
        """x (T, D) through all layers, in place, but for what the last half layer adds: that comes
        back, (T, D), since it is added together with the next norm."""
        delta, kernels = None, self.kernels
        for i, layer in enumerate(self.layers):
            # (T, D)
            h = kernels.add_norm(x, delta, layer.attention_norm.weight, layer.attention_norm.eps)
            delta = layer.attention(h, batch, turn, cache, i, kernels)
            h = kernels.add_norm(x, delta, layer.ffn_norm.weight, layer.ffn_norm.eps)
            delta = layer.feed_forward(h, kernels)
        return delta

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(R, D) -> (R, V) fp32: this rank's vocabulary rows, padding included."""
        return self.head(x).float()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype."""
        R = len(x)
        if R < self.rows_floor:
            x = F.pad(x, (0, 0, 0, self.rows_floor - R))
        return self.output.matrix(x)[:R]  # (R, V)


def build(
    config: ModelConfig,
    ranks: Ranks,
    dtype: torch.dtype,
    n_positions: int,
    weights: dict[str, torch.Tensor],
    deterministic: bool = False,
    kernels: Kernels | None = None,
) -> Transformer:
    """A model filled from whole weights in memory (tests, and models made up on the spot).

    weights: Meta's names, whole shapes; each rank keeps its own part, zero-padded as the loader
        would.
    """
    model = Transformer(config, ranks, dtype, n_positions, deterministic, kernels)
    shard = ShardMap.even(config, ranks.tp).shard(ranks.rank)
    for weight in table(config):
        part, slot = weight.part(shard), model.into(weight)
        slot.zero_()
        if part.dim is None:
            slot.copy_(weights[weight.name])
        else:
            n = part.stop - part.start
            slot.narrow(part.dim, 0, n).copy_(weights[weight.name].narrow(part.dim, part.start, n))
        model.loaded(weight)
    return model
