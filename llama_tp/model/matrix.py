"""A rank's cut of a weight, ready to multiply with: in C++, packed by oneDNN, or as it is.

`Kernels.matrix` makes the one that suits the machine. What all of them promise about bits: from
`rows_floor` rows on, a row's bits depend neither on the number of rows, nor on how many of the
weight's rows this rank holds, nor on threads. Of the C++ ones that is so by construction; of
oneDNN's it was measured (torch 2.13, AVX512-BF16; M 2..512, K 32..8192, fp32 and bf16, 1 and 2
threads), and is checked by tests/model/test_matrix.py on the machine that runs it.

A product cut into K-chunks is the sum of theirs, added in fp32 as one fixed binary tree
(collectives.tree_add), so that it does not matter which rank holds which chunk. In C++ that costs
nothing. oneDNN's chunks are products of their own, each rounded to the dtype first (bf16: rms error
3.6e-3 against 1.7e-3 for one product).
"""

import ctypes
from typing import Protocol

import torch
import torch.nn.functional as F

from llama_tp.parallel.collectives import tree_add

# fewest rows where weights are packed by oneDNN: its products with a single row take another path
ROWS_FLOOR = 2
PLAIN_ROWS_FLOOR = 16  # the same for plain products (MKL: row bits settle at 4 to 12 rows)
BLOCK = 64  # outputs that the C++ products compute together (WIDTH in product.cpp)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of the C++ products, as their names end


class Matrix(Protocol):
    """An [out, in] weight, as n_chunks parts of its inputs."""

    rows_floor: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in) -> (T, out)."""

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """The same sums in fp32, to be added to those of other ranks."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The weight's own rows, as an embedding's: (T,) ids -> (T, in)."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine has oneDNN's packed linear for the dtype: it reads weights at 95-100% of
    the memory bandwidth where plain `F.linear` in bf16 reaches 45-67%."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class TorchMatrix:
    """Torch's products: every device and dtype.

    lookups: whether `rows` will be asked for, which a packed weight cannot answer.
    """

    def __init__(self, weight: torch.Tensor, n_chunks: int = 1, lookups: bool = False):
        packable = can_pack(weight.dtype, weight.device)
        self.packed = packable and not lookups
        self.rows_floor = (
            ROWS_FLOOR
            if packable and (self.packed or weight.dtype == torch.bfloat16)
            else PLAIN_ROWS_FLOOR
        )
        self.chunks = [chunk.contiguous() for chunk in weight.chunk(n_chunks, dim=1)]
        # the batch-size hint (1) asks for the layout that suits decode; larger batches read it as
        # well
        if self.packed:
            self.chunks = [
                torch.ops.mkldnn._reorder_linear_weight(chunk, 1) for chunk in self.chunks
            ]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._times(x, self.chunks[0]) if len(self.chunks) == 1 else self.wide(x).to(x.dtype)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self.chunks), dim=1)
        return tree_add(
            [
                self._times(part.contiguous(), chunk).float()
                for part, chunk in zip(parts, self.chunks)
            ]
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.chunks[0])

    def _times(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return F.linear(x, weight)


class NativeMatrix:
    """The C++ products (native/product.cpp). Takes the weight's memory over and packs it in
    place."""

    rows_floor = 1

    def __init__(self, weight: torch.Tensor, n_chunks: int, library: ctypes.CDLL):
        self.n_out, self.n_in = weight.shape
        self.n_chunks, self.dtype = n_chunks, weight.dtype
        self.weight = (
            F.pad(weight, (0, 0, 0, -self.n_out % BLOCK))
            if self.n_out % BLOCK
            else weight.contiguous()
        )
        ending = DTYPES[weight.dtype]
        self._product, self._take_rows = (
            getattr(library, f"product_{ending}"),
            getattr(library, f"take_rows_{ending}"),
        )
        getattr(library, f"pack_{ending}")(self.weight.data_ptr(), *self.weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(x), self.n_out), dtype=self.dtype)
        self._times(x, None, out.data_ptr())
        return out

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(x), self.n_out), dtype=torch.float32)
        self._times(x, out.data_ptr(), None)
        return out

    def _times(self, x: torch.Tensor, wide: int | None, out: int | None) -> None:
        x = x.contiguous()
        self._product(
            x.data_ptr(),
            self.weight.data_ptr(),
            wide,
            out,
            len(x),
            self.n_in,
            self.n_out,
            self.n_chunks,
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        out, ids = torch.empty((len(ids), self.n_in), dtype=self.dtype), ids.contiguous()
        if not self._take_rows(
            self.weight.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), self.n_out, self.n_in
        ):
            raise IndexError(f"a token id is not below {self.n_out}")
        return out
