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
import torch.nn.functional as F

from llama_tp.arch.shard_map import Axis, Range
from llama_tp.arch.summation import add_subtrees
from llama_tp.backends.base import EmbeddingLinear, Linear
from llama_tp.backends.select import Backends
from llama_tp.parallel.collectives import all_reduce, gather_stack, tree_sum
from llama_tp.parallel.groups import Ranks


@dataclass(frozen=True)
class Partials:
    """What one rank has of a sum over all ranks: the product of a row-parallel linear.

    Attributes:
        parts: (T, out) each. In a fixed order fp32, one for each of the rank's `axis.subtrees`;
            else one, in `dtype`.
        fixed_order: whether they are added in arch.summation's order; else the order is the
            collective's.
        axis: the K-chunks, and how they are dealt to the ranks.
        dtype: of the sum.
    """

    parts: list[torch.Tensor]
    fixed_order: bool
    axis: Axis
    dtype: torch.dtype
    ranks: Ranks

    def sum_over_ranks(self) -> torch.Tensor:
        """-> (T, out), the same on every rank. One collective, or none with one rank; may overwrite
        the parts."""
        if not self.fixed_order:
            return all_reduce(self.parts[0], self.ranks)
        if self.axis.n_partials == 1:
            return tree_sum(self.parts[0], self.ranks).to(self.dtype)
        n, mine = self.axis.n_partials, torch.stack(self.parts)
        stack = gather_stack(F.pad(mine, (0, 0, 0, 0, 0, n - len(mine))), self.ranks)
        sums = {
            tree: stack[rank, i]
            for rank in range(self.ranks.tp)
            for i, tree in enumerate(self.axis.subtrees[rank])
        }
        return add_subtrees(sums, self.axis.n_leaves).to(self.dtype)


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
    """A weight (out, in) of two dimensions. Once filled it lives in `linears` alone, which may have
    laid it out anew.

    Attributes:
        products: columns and K-chunks of each product that it is cut into; usually one.
        linears: what multiplies with each, and `linear`, the first.
    """

    linears: list[Linear]
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
        self.backends = backends
        self.products = [(slice(0, in_features), n_chunks)]

    def finish(self) -> None:
        weight, self.weight = self.weight, torch.empty_like(self.weight, device="meta")
        if len(self.products) == 1:  # takes the weight's memory over
            self.linears = [self.make_linear(weight, self.products[0][1])]
        else:
            self.linears = [
                self.make_linear(weight[:, columns].contiguous(), n_chunks)
                for columns, n_chunks in self.products
            ]
        self.linear = self.linears[0]

    def make_linear(self, weight: torch.Tensor, n_chunks: int) -> Linear:
        return self.backends.linear(weight, n_chunks)


class ColumnParallelLinear(ParallelLinear):
    """y = x W^T with W's rows (output columns) cut over the ranks: (T, in) -> (T, out on this
    rank), no communication."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class RowParallelLinear(ParallelLinear):
    """y = sum over ranks of x_r W_r^T, W's columns and x cut over the ranks: (T, in on this rank)
    -> Partials of (T, out).

    In deterministic mode it is one product for each subtree of the sum that this rank holds, and
    that product is cut into the subtree's K-chunks. Equal parts are one subtree each.

    Args:
        axis: W's columns, and how they are dealt.
        place: this rank's among those that they are dealt to.
    """

    def __init__(
        self,
        axis: Axis,
        place: int,
        out_features: int,
        dtype: torch.dtype,
        ranks: Ranks,
        backends: Backends,
        deterministic: bool = False,
    ):
        leaves = axis.leaves(place)
        super().__init__(
            axis.of(place).width,
            out_features,
            dtype,
            backends,
            n_chunks=len(leaves) if deterministic else 1,
        )
        self.axis, self.ranks, self.fixed_order = axis, ranks, deterministic and ranks.tp > 1
        if self.fixed_order and len(axis.subtrees[place]) > 1:
            starts = [(tree.start - leaves.start) * axis.leaf for tree in axis.subtrees[place]]
            self.products = [
                (slice(start, start + len(tree) * axis.leaf), len(tree))
                for start, tree in zip(starts, axis.subtrees[place])
            ]

    def __call__(self, x: torch.Tensor) -> Partials:
        if not self.fixed_order:
            parts = [self.linear(x)]
        elif len(self.products) == 1:
            parts = [self.linear.partial_sums(x)]
        else:
            parts = [
                linear.partial_sums(x[:, columns])
                for linear, (columns, _) in zip(self.linears, self.products)
            ]
        return Partials(parts, self.fixed_order, self.axis, x.dtype, self.ranks)


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

    def make_linear(self, weight: torch.Tensor, n_chunks: int) -> EmbeddingLinear:
        return self.backends.embedding(weight, self.tied)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self.ranks.tp == 1:
            return self.linear.embedding(ids)
        local = ids - self.first
        mine = (local >= 0) & (local < self.n)  # (T,)
        rows = self.linear.embedding(local.clamp(0, self.n - 1)) * mine.unsqueeze(-1)  # (T, D)
        return all_reduce(rows, self.ranks)
