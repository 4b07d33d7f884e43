"""The parallel layers: column- and row-parallel linears, the vocab-parallel embedding and head.

A rank holds only its cut of a weight, first on the meta device, then filled in place by the loader through `slot`,
then packed for the machine. fairscale's layers of the same names are the oracle of the tests; ours differ in that
they never allocate the whole weight, and in what they promise about bits:

* CPU weights are packed by oneDNN, which reads them at 95-100% of the memory bandwidth where plain `F.linear` in
  bf16 reaches 45-67% (all linears of the 1B shape, 1 and 2 threads). With packed weights a row's bits depend neither
  on the number of rows (from ROWS_FLOOR on), nor on how many of the weight's rows this rank holds, nor on threads:
  measured on torch 2.13 / AVX512-BF16, M 2..512, K 32..8192, bf16 and fp32, 1 and 2 threads.
* A deterministic row-parallel product is computed as a fixed number of K-chunks whose fp32 sums are added as one
  fixed binary tree, whatever the ranks (see collectives.tree_sum). The price: partial products are rounded to the
  dtype first (bf16: rms error 3.6e-3 against 1.7e-3 for one product).
"""

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from llama_tp.parallel.collectives import all_reduce, tree_sum
from llama_tp.parallel.groups import Ranks

ROWS_FLOOR = 2                  # fewest rows of a step in deterministic mode where every weight is packed
PLAIN_ROWS_FLOOR = 16           # the same for plain fp32 products (MKL: row bits settle at 4 to 12 rows)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has oneDNN's packed linear for the dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Matrix:
    """One [out, in] matrix ready to multiply: packed where the machine can, else as it is."""

    def __init__(self, weight: torch.Tensor):
        self.packed = can_pack(weight.dtype, weight.device)
        # The batch-size hint (1) asks for the layout that is best for decode; larger batches read it as well.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)


class Spare:
    """Buffers that weights lie in from being read to being packed, used over and over: the first touch of fresh memory
    costs 0.6-1.7 s a GB here, reading a warm file into pages that are there 0.06."""

    def __init__(self):
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()                       # one thread reads, another packs

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor in the smallest free buffer that holds it, or in a new one."""
        n_bytes = shape.numel() * dtype.itemsize
        with self._lock:
            fitting = [i for i, buffer in enumerate(self._free) if len(buffer) >= n_bytes]
            at = min(fitting, key=lambda i: len(self._free[i]), default=None)
            buffer = torch.empty(n_bytes, dtype=torch.uint8) if at is None else self._free.pop(at)
        return buffer[:n_bytes].view(dtype).view(shape)

    def give(self, tensor: torch.Tensor) -> None:
        """Takes the buffer of a tensor that nobody needs any longer."""
        with self._lock:
            self._free.append(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()))

    def clear(self) -> None:
        self._free.clear()


class ShardedWeight(nn.Module):
    """A weight that one rank holds a cut of: meta at first, real once the loader asks for a slot of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def slot(self, device: torch.device, spare: Spare, start: int = 0, n: int | None = None) -> torch.Tensor:
        """Rows [start, start + n) of the weight, to be filled in place; allocates it the first time."""
        if self.weight.is_meta:
            self.weight = nn.Parameter(self._allocate(device, spare), requires_grad=False)
        return self.weight.data[start:] if n is None else self.weight.data[start:start + n]

    def _allocate(self, device: torch.device, spare: Spare) -> torch.Tensor:
        return torch.empty_like(self.weight, device=device)

    def finish(self, spare: Spare) -> None:
        """Called once every row is filled. Layers that multiply pack their weight here."""


class ShardedLinear(ShardedWeight):
    """Holds its matrix as `n_chunks` slices of the input dimension, packed one by one."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, n_chunks: int = 1):
        super().__init__((out_features, in_features), dtype)
        self.n_chunks = n_chunks
        self.matrices: list[Matrix] = []

    def _allocate(self, device: torch.device, spare: Spare) -> torch.Tensor:
        packs = can_pack(self.weight.dtype, device)
        return spare.take(self.weight.shape, self.weight.dtype) if packs else super()._allocate(device, spare)

    def finish(self, spare: Spare) -> None:
        weight = self.weight.data
        self.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        if not can_pack(weight.dtype, weight.device):
            self.matrices = [Matrix(chunk.contiguous()) for chunk in weight.chunk(self.n_chunks, dim=1)]
            return
        for chunk in weight.chunk(self.n_chunks, dim=1):
            alone = spare.take(chunk.shape, chunk.dtype).copy_(chunk) if self.n_chunks > 1 else weight
            self.matrices.append(Matrix(alone))
            spare.give(alone)
        if self.n_chunks > 1:
            spare.give(weight)


class ColumnParallelLinear(ShardedLinear):
    """y = x W^T with W's rows (output columns) cut over the ranks: (T, in) -> (T, out on this rank), no communication."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrices[0](x)


class RowParallelLinear(ShardedLinear):
    """y = sum over ranks of x_r W_r^T, W's columns and x cut over the ranks: (T, in on this rank) -> (T, out).

    n_chunks: this rank's K-chunks in deterministic mode, else 1; `add` is then Kernels.tree_add.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, ranks: Ranks, n_chunks: int = 1,
                 deterministic: bool = False, add: Callable[[list[torch.Tensor], bool], torch.Tensor] | None = None):
        super().__init__(in_features, out_features, dtype, n_chunks)
        self.ranks, self.deterministic, self.add = ranks, deterministic, add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.deterministic:
            return all_reduce(self.matrices[0](x), self.ranks)
        chunks = x.chunk(self.n_chunks, dim=1)
        parts = [matrix(part.contiguous()) for matrix, part in zip(self.matrices, chunks)]
        if self.ranks.tp == 1:
            return self.add(parts, True)
        return tree_sum(self.add(parts, False), self.ranks).to(x.dtype)


class VocabParallelEmbedding(ShardedWeight):
    """Rows of the vocabulary cut over the ranks: each looks up the ids it owns, the others give zeros, and the sum
    is exact at any degree. (T,) ids -> (T, D)."""

    def __init__(self, local_vocab: int, dim: int, dtype: torch.dtype, ranks: Ranks):
        super().__init__((local_vocab, dim), dtype)
        self.first, self.n, self.ranks = ranks.rank * local_vocab, local_vocab, ranks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.ranks.tp == 1:
            return F.embedding(ids, self.weight)
        local = ids - self.first
        mine = (local >= 0) & (local < self.n)
        return all_reduce(F.embedding(local.clamp(0, self.n - 1), self.weight) * mine.unsqueeze(-1), self.ranks)


class TiedHead:
    """The head of a model whose head *is* the embedding: multiplies by the plain embedding weight, since a packed copy
    would hold the largest matrix of a small model twice. `times` is Kernels': F.linear reads the 1B's 525 MB in 20 ms,
    the C++ one in 10-14 (1 to 8 rows)."""

    def __init__(self, embedding: VocabParallelEmbedding, times: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self.embedding, self.times = embedding, times

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, V on this rank)."""
        return self.times(x, self.embedding.weight)
