"""The parallel layers: column- and row-parallel linears, and the vocab-parallel embedding.

A rank holds only its cut of a weight, first on the meta device, then filled in place by the loader
through `slot`, then handed to what multiplies with it (matrix.py). fairscale's layers of the same
names are the oracle of the tests; ours differ in that they never allocate the whole weight, in that
a row-parallel product can be a fixed number of K-chunks, whatever the ranks, and in that they are
plain objects: nothing here is trained, saved or moved, and calling an nn.Module costs as much as a
small product.
"""

import torch

from llama_tp.model.kernels import Kernels
from llama_tp.model.matrix import Matrix, TorchMatrix
from llama_tp.parallel.collectives import all_reduce, tree_sum
from llama_tp.parallel.groups import Ranks


class ShardedWeight:
    """A weight that one rank holds a cut of: meta at first, real once the loader asks for a slot of
    it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.weight = torch.empty(shape, dtype=dtype, device="meta")

    def slot(self, device: torch.device, start: int = 0, n: int | None = None) -> torch.Tensor:
        """Rows [start, start + n) of the weight, to be filled in place; allocates it the first
        time."""
        if self.weight.is_meta:
            # not empty_like: of a meta tensor it imports sympy, 1 s of a core a rank
            self.weight = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=device)
        return self.weight[start:] if n is None else self.weight[start : start + n]

    def finish(self) -> None:
        """Called once every row is filled."""


class ShardedMatrix(ShardedWeight):
    """A weight of two dimensions. Once filled it lives in `matrix` alone, which may have laid it
    out anew."""

    matrix: Matrix
    multiplies = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        kernels: Kernels,
        n_chunks: int = 1,
    ):
        super().__init__((out_features, in_features), dtype)
        self.kernels, self.n_chunks = kernels, n_chunks

    def finish(self) -> None:
        weight, self.weight = self.weight, torch.empty_like(self.weight, device="meta")
        self.matrix = self.ready(weight)

    def ready(self, weight: torch.Tensor) -> Matrix:
        return self.kernels.matrix(weight, self.n_chunks)


class ColumnParallelLinear(ShardedMatrix):
    """y = x W^T with W's rows (output columns) cut over the ranks: (T, in) -> (T, out on this
    rank), no communication."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix(x)


class RowParallelLinear(ShardedMatrix):
    """y = sum over ranks of x_r W_r^T, W's columns and x cut over the ranks: (T, in on this rank)
    -> (T, out).

    n_chunks: this rank's K-chunks in deterministic mode, else 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        ranks: Ranks,
        kernels: Kernels,
        n_chunks: int = 1,
        deterministic: bool = False,
    ):
        super().__init__(in_features, out_features, dtype, kernels, n_chunks)
        self.ranks, self.deterministic = ranks, deterministic

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.ranks.tp > 1 and self.deterministic:
            return tree_sum(self.matrix.wide(x), self.ranks).to(x.dtype)
        return all_reduce(self.matrix(x), self.ranks)


class VocabParallelEmbedding(ShardedMatrix):
    """Rows of the vocabulary cut over the ranks: each looks up the ids it owns, the others give
    zeros, and the sum is exact at any degree. (T,) ids -> (T, D). tied: whether `matrix` is the
    head as well."""

    def __init__(
        self,
        local_vocab: int,
        dim: int,
        dtype: torch.dtype,
        ranks: Ranks,
        kernels: Kernels,
        tied: bool,
    ):
        super().__init__(dim, local_vocab, dtype, kernels)
        self.first, self.n, self.ranks, self.multiplies = (
            ranks.rank * local_vocab,
            local_vocab,
            ranks,
            tied,
        )

    def ready(self, weight: torch.Tensor) -> Matrix:
        return (
            self.kernels.matrix(weight, lookups=True)
            if self.multiplies
            else TorchMatrix(weight, lookups=True)
        )

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if self.ranks.tp == 1:
            return self.matrix.rows(ids)
        local = ids - self.first
        mine = (local >= 0) & (local < self.n)
        return all_reduce(
            self.matrix.rows(local.clamp(0, self.n - 1)) * mine.unsqueeze(-1), self.ranks
        )
