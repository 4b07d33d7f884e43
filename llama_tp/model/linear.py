"""The parallel linears: column-parallel, row-parallel, and the vocab-parallel embedding. They own
the cut of a weight over the ranks, and the sum that the cut makes necessary.

A rank holds only its cut of a weight: first on the meta device, then filled in place by the loader
through `destination`, then handed to the backend that multiplies with it. fairscale's layers of the
same names are the oracle of the tests. Ours never allocate the whole weight, and a row-parallel
product can be a fixed number of K-chunks, whatever the ranks. They are plain objects: nothing here
is trained, saved or moved, and calling an nn.Module costs as much as a small product.
"""

from dataclasses import dataclass

import torch

from llama_tp.arch.shard_map import Range
from llama_tp.backends.base import EmbeddingLinear, Linear
from llama_tp.backends.select import Backends
from llama_tp.parallel.collectives import all_reduce, tree_sum
from llama_tp.parallel.groups import Ranks


@dataclass(frozen=True)
class Partials:
    """What one rank has of a sum over all ranks: the product of a row-parallel linear.

    Attributes:
        parts: (T, out) each, one for each maximal subtree of the sum that this rank holds, in the
            order of K. Today that is one, since a rank holds a run of 2**k of the K-chunks.
        fixed_order: whether the parts are fp32 and are added in arch.summation's order; else they
            are in `dtype`, and the order is the collective's.
        dtype: of the sum.
    """

    parts: list[torch.Tensor]
    fixed_order: bool
    dtype: torch.dtype
    ranks: Ranks

    def sum_over_ranks(self) -> torch.Tensor:
        """-> (T, out), the same on every rank. One collective, or none with one rank; may overwrite
        the parts."""
        [part] = self.parts
        if self.fixed_order:
            return tree_sum(part, self.ranks).to(self.dtype)
        return all_reduce(part, self.ranks)


class ShardedWeight:
    """A weight that one rank holds a cut of: meta at first, real once the loader asks for a
    destination in it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.weight = torch.empty(shape, dtype=dtype, device="meta")

    def destination(
        self, device: torch.device, start: int = 0, n: int | None = None
    ) -> torch.Tensor:
        """A view of rows [start, start + n) of the weight, to be filled in place; allocates the
        weight the first time."""
        if self.weight.is_meta:
            # not empty_like: of a meta tensor it imports sympy, 1 s of a core a rank
            self.weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=device)
        return self.weight[start:] if n is None else self.weight[start : start + n]

    def finish(self) -> None:
        """Called once every row is filled."""


class ParallelLinear(ShardedWeight):
    """A weight (out, in) of two dimensions. Once filled it lives in `linear` alone, which may have
    laid it out anew."""

    linear: Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        backends: Backends,
        n_chunks: int = 1,
    ):
        super().__init__((out_features, in_features), dtype)
        self.backends, self.n_chunks = backends, n_chunks

    def finish(self) -> None:
        weight, self.weight = self.weight, torch.empty_like(self.weight, device="meta")
        self.linear = self.make_linear(weight)

    def make_linear(self, weight: torch.Tensor) -> Linear:
        return self.backends.linear(weight, self.n_chunks)


class ColumnParallelLinear(ParallelLinear):
    """y = x W^T with W's rows (output columns) cut over the ranks: (T, in) -> (T, out on this
    rank), no communication."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class RowParallelLinear(ParallelLinear):
    """y = sum over ranks of x_r W_r^T, W's columns and x cut over the ranks: (T, in on this rank)
    -> Partials of (T, out).

    n_chunks: this rank's K-chunks in deterministic mode, else 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        ranks: Ranks,
        backends: Backends,
        n_chunks: int = 1,
        deterministic: bool = False,
    ):
        super().__init__(in_features, out_features, dtype, backends, n_chunks)
        self.ranks, self.fixed_order = ranks, deterministic and ranks.tp > 1

    def __call__(self, x: torch.Tensor) -> Partials:
        y = self.linear.partial_sums(x) if self.fixed_order else self.linear(x)
        return Partials([y], self.fixed_order, x.dtype, self.ranks)


class VocabParallelEmbedding(ParallelLinear):
    """Rows of the vocabulary cut over the ranks: each looks up the ids it owns, the others give
    zeros, and the sum is exact at any degree. (T,) int64 -> (T, D).

    Args:
        vocab: this rank's rows.
        tied: whether `linear` is the output head as well.
    """

    linear: EmbeddingLinear

    def __init__(
        self,
        vocab: Range,
        dim: int,
        dtype: torch.dtype,
        ranks: Ranks,
        backends: Backends,
        tied: bool,
    ):
        super().__init__(dim, vocab.width, dtype, backends)
        self.first, self.n = vocab.start, vocab.width
        self.ranks, self.tied = ranks, tied

    def make_linear(self, weight: torch.Tensor) -> EmbeddingLinear:
        return self.backends.embedding(weight, self.tied)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self.ranks.tp == 1:
            return self.linear.embedding(ids)
        local = ids - self.first
        mine = (local >= 0) & (local < self.n)  # (T,)
        rows = self.linear.embedding(local.clamp(0, self.n - 1)) * mine.unsqueeze(-1)  # (T, D)
        return all_reduce(rows, self.ranks)
