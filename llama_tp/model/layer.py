"""The parts of a transformer layer on one rank, and the step that goes through them. Tensor letters
as in transformer.py."""

from dataclasses import dataclass

import torch

from llama_tp.arch.config import ModelConfig
from llama_tp.model.attention import Group, Paged
from llama_tp.model.kernels import Kernels, NativePlan
from llama_tp.model.kv_cache import KVCache, Slots
from llama_tp.model.linear import ColumnParallelLinear, RowParallelLinear, ShardedWeight
from llama_tp.model.rope import Turn
from llama_tp.parallel.groups import Ranks


@dataclass(frozen=True)
class Batch:
    """What one forward pass computes: T tokens of any sequences, where they are stored and what
    they attend to."""

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    slots: Slots
    plan: list[Group] | Paged | NativePlan


class RMSNorm(ShardedWeight):
    """The weight of a root-mean-square norm; Kernels.add_norm does the arithmetic."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype):
        super().__init__((dim,), dtype)
        self.eps = eps


class Attention:
    """Attention of one rank's heads."""

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        deterministic: bool,
        kernels: Kernels,
    ):
        self.H, self.K, self.E = (
            config.n_heads // ranks.tp,
            config.local_kv_heads(ranks.tp),
            config.head_dim,
        )
        n_chunks = config.n_chunks(ranks.tp) // ranks.tp if deterministic else 1
        self.wqkv = ColumnParallelLinear(config.dim, (self.H + 2 * self.K) * self.E, dtype, kernels)
        self.wo = RowParallelLinear(
            self.H * self.E, config.dim, dtype, ranks, kernels, n_chunks, deterministic
        )

    def __call__(
        self,
        x: torch.Tensor,
        batch: Batch,
        turn: Turn,
        cache: KVCache,
        layer: int,
        kernels: Kernels,
    ) -> torch.Tensor:
        T, H, K, E = len(x), self.H, self.K, self.E
        qkv = self.wqkv(x).view(T, H + 2 * K, E)  # (T, H + 2K, E)
        q = kernels.rotate_write(qkv, H, turn, batch.slots, cache, layer)  # (T, H, E)
        out = kernels.attend(q, cache, layer, batch.plan)  # (T, H, E)
        return self.wo(out.reshape(T, H * E))  # (T, D)


class FeedForward:
    """w2(silu(w1 x) * w3 x), w1 and w3 in one product."""

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        deterministic: bool,
        kernels: Kernels,
    ):
        self.ffn = config.local_ffn(ranks.tp)
        n_chunks = config.n_chunks(ranks.tp) // ranks.tp if deterministic else 1
        self.w13 = ColumnParallelLinear(config.dim, 2 * self.ffn, dtype, kernels)
        self.w2 = RowParallelLinear(
            self.ffn, config.dim, dtype, ranks, kernels, n_chunks, deterministic
        )

    def __call__(self, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return self.w2(kernels.silu_mul(self.w13(x)))  # (T, D)


class Layer:
    """The parts of a layer, in the order in which Transformer goes through them."""

    def __init__(
        self,
        config: ModelConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        deterministic: bool,
        kernels: Kernels,
    ):
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.attention = Attention(config, ranks, dtype, deterministic, kernels)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.feed_forward = FeedForward(config, ranks, dtype, deterministic, kernels)
