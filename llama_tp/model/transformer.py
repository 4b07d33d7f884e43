"""The Llama transformer of one rank: its cut of every weight, and one forward pass over a step's tokens.

Meta's structure and names (llama-models `model.py`), with wq/wk/wv fused into one product and w1/w3 into another.
Two sums over the ranks a layer (after wo and after w2) and one after the embedding. Tensor letters are sizes *on
this rank*: T tokens in the step, D model dim, H query heads, K KV heads, E head dim, F ffn dim, V vocab rows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_tp.model.attention import Group, Paged
from llama_tp.model.kernels import Kernels, NativePlan, pick
from llama_tp.model.kv_cache import KVCache, Slots
from llama_tp.model.linear import ColumnParallelLinear, RowParallelLinear, ShardedMatrix, ShardedWeight, VocabParallelEmbedding
from llama_tp.model.rope import Rope, Turn
from llama_tp.parallel.groups import Ranks
from llama_tp.spec.config import ModelConfig
from llama_tp.spec.weights import Weight, table


@dataclass(frozen=True)
class Batch:
    """What one forward pass computes: T tokens of any sequences, where they are stored and what they attend to."""

    ids: torch.Tensor           # (T,) int64
    positions: torch.Tensor     # (T,) int64
    slots: Slots
    plan: list[Group] | Paged | NativePlan


class RMSNorm(ShardedWeight):
    """The weight of a root-mean-square norm; Kernels.add_norm does the arithmetic."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype):
        super().__init__((dim,), dtype)
        self.eps = eps


class Attention:
    def __init__(self, config: ModelConfig, ranks: Ranks, dtype: torch.dtype, deterministic: bool, kernels: Kernels):
        self.H, self.K, self.E = config.n_heads // ranks.tp, config.local_kv_heads(ranks.tp), config.head_dim
        n_chunks = config.n_chunks(ranks.tp) // ranks.tp if deterministic else 1
        self.wqkv = ColumnParallelLinear(config.dim, (self.H + 2 * self.K) * self.E, dtype, kernels)
        self.wo = RowParallelLinear(self.H * self.E, config.dim, dtype, ranks, kernels, n_chunks, deterministic)

    def __call__(self, x: torch.Tensor, batch: Batch, turn: Turn, cache: KVCache, layer: int, kernels: Kernels) -> torch.Tensor:
        T, H, K, E = len(x), self.H, self.K, self.E
        qkv = self.wqkv(x).view(T, H + 2 * K, E)                                # (T, H + 2K, E)
        q = kernels.rotate_write(qkv, H, turn, batch.slots, cache, layer)       # (T, H, E)
        out = kernels.attend(q, cache, layer, batch.plan)                       # (T, H, E)
        return self.wo(out.reshape(T, H * E))                                   # (T, D)


class FeedForward:
    def __init__(self, config: ModelConfig, ranks: Ranks, dtype: torch.dtype, deterministic: bool, kernels: Kernels):
        self.ffn = config.local_ffn(ranks.tp)
        n_chunks = config.n_chunks(ranks.tp) // ranks.tp if deterministic else 1
        self.w13 = ColumnParallelLinear(config.dim, 2 * self.ffn, dtype, kernels)
        self.w2 = RowParallelLinear(self.ffn, config.dim, dtype, ranks, kernels, n_chunks, deterministic)

    def __call__(self, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return self.w2(kernels.silu_mul(self.w13(x)))                           # (T, D)


class Layer:
    def __init__(self, config: ModelConfig, ranks: Ranks, dtype: torch.dtype, deterministic: bool, kernels: Kernels):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.attention = Attention(config, ranks, dtype, deterministic, kernels)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.feed_forward = FeedForward(config, ranks, dtype, deterministic, kernels)


class Transformer:
    """One rank's model. Built on the meta device; `into` and `loaded` are what the loader fills it through.

    Args:
        config: the whole model's sizes.
        ranks: this rank's place.
        dtype: of weights and activations.
        n_positions: longest sequence, for the rotary tables.
        deterministic: fixed summation order, bits that do not depend on the company, the chunking or tp.
        kernels: what to compute with between the products; the fastest that there is unless given.
    """

    def __init__(self, config: ModelConfig, ranks: Ranks, dtype: torch.dtype, n_positions: int, deterministic: bool = False,
                 kernels: Kernels | None = None):
        self.config, self.ranks, self.dtype, self.deterministic = config, ranks, dtype, deterministic
        self.kernels = kernels or pick(ranks.device, dtype, deterministic)
        self.tok_embeddings = VocabParallelEmbedding(config.local_vocab(ranks.tp), config.dim, dtype, ranks, self.kernels,
                                                     config.tied)
        self.layers = [Layer(config, ranks, dtype, deterministic, self.kernels) for _ in range(config.n_layers)]
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.output = self.tok_embeddings if config.tied else ColumnParallelLinear(config.dim, config.local_vocab(ranks.tp),
                                                                                   dtype, self.kernels)
        self.rope = Rope(config, n_positions, ranks.device)
        # Fewest rows a step must have for a row's bits not to depend on their number (1: it never does, or no promise is made).
        self.rows_floor = 1
        self._slots = self._table_of_slots()
        self._missing = {id(module): sum(m is module for m, _, _ in self._slots.values())
                         for module, _, _ in self._slots.values()}

    # ------------------------------------------------------------------------------------------------- loading

    def _table_of_slots(self) -> dict[str, tuple[ShardedWeight, int, int | None]]:
        """name -> (module, first row, rows): where each weight of the table lands in the fused modules."""
        slots: dict[str, tuple[ShardedWeight, int, int | None]] = {
            "tok_embeddings.weight": (self.tok_embeddings, 0, None), "norm.weight": (self.norm, 0, None)}
        if not self.config.tied:
            slots["output.weight"] = (self.output, 0, None)
        for i, layer in enumerate(self.layers):
            attention, ffn = layer.attention, layer.feed_forward
            q, kv = attention.H * attention.E, attention.K * attention.E
            for name, slot in {
                "attention_norm": (layer.attention_norm, 0, None), "ffn_norm": (layer.ffn_norm, 0, None),
                "attention.wq": (attention.wqkv, 0, q), "attention.wk": (attention.wqkv, q, kv),
                "attention.wv": (attention.wqkv, q + kv, kv), "attention.wo": (attention.wo, 0, None),
                "feed_forward.w1": (ffn.w13, 0, ffn.ffn), "feed_forward.w3": (ffn.w13, ffn.ffn, ffn.ffn),
                "feed_forward.w2": (ffn.w2, 0, None),
            }.items():
                slots[f"layers.{i}.{name}.weight"] = slot
        return slots

    def into(self, weight: Weight) -> torch.Tensor:
        """The view that this rank's part of `weight` is read into."""
        module, start, n = self._slots[weight.name]
        return module.slot(self.ranks.device, start, n)

    def loaded(self, weight: Weight) -> None:
        """Tells the model that `weight` is complete; a fused matrix is packed when its last part is."""
        module = self._slots[weight.name][0]
        self._missing[id(module)] -= 1
        if not self._missing[id(module)]:
            module.finish()
            if self.deterministic and isinstance(module, ShardedMatrix) and module.multiplies:
                self.rows_floor = max(self.rows_floor, module.matrix.rows_floor)

    # ------------------------------------------------------------------------------------------------- forward

    def __call__(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """All tokens of a step through all layers. -> (T, D), normed, ready for `logits`."""
        turn, kernels = self.rope.at(batch.positions), self.kernels
        x = self.tok_embeddings(batch.ids)                                      # (T, D)
        delta = None                            # what the last half layer adds to x, together with the next norm
        for i, layer in enumerate(self.layers):
            h = kernels.add_norm(x, delta, layer.attention_norm.weight, layer.attention_norm.eps)       # (T, D)
            delta = layer.attention(h, batch, turn, cache, i, kernels)
            h = kernels.add_norm(x, delta, layer.ffn_norm.weight, layer.ffn_norm.eps)
            delta = layer.feed_forward(h, kernels)
        return kernels.add_norm(x, delta, self.norm.weight, self.norm.eps)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(R, D) -> (R, V) fp32: this rank's vocabulary rows, padding included."""
        return self.head(x).float()

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """The same in the model's dtype."""
        R = len(x)
        if R < self.rows_floor:
            x = F.pad(x, (0, 0, 0, self.rows_floor - R))
        return self.output.matrix(x)[:R]                                             # (R, V)


def build(config: ModelConfig, ranks: Ranks, dtype: torch.dtype, n_positions: int, weights: dict[str, torch.Tensor],
          deterministic: bool = False, kernels: Kernels | None = None) -> Transformer:
    """A model filled from whole weights in memory (tests, and models made up on the spot).

    weights: Meta's names, whole shapes; each rank keeps its own part, zero-padded as the loader would.
    """
    model = Transformer(config, ranks, dtype, n_positions, deterministic, kernels)
    for weight in table(config):
        part, slot = weight.part(config, ranks.rank, ranks.tp), model.into(weight)
        slot.zero_()
        if part.dim is None:
            slot.copy_(weights[weight.name])
        else:
            n = part.stop - part.start
            slot.narrow(part.dim, 0, n).copy_(weights[weight.name].narrow(part.dim, part.start, n))
        model.loaded(weight)
    return model
