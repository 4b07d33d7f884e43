"""Products in C++ with packed weights (native/product.cpp): CPU, fp32 and bf16.

Each sum is one chain of fp32 steps over K, whatever the number of rows, outputs and threads, so
that a row's bits are its own by construction. A product in K-chunks is a chain for each, added in
fp32 as one binary tree, in the same pass.
"""

from ctypes import CDLL

import torch
import torch.nn.functional as F

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of the C++ functions, as their names end
BLOCK = 64  # outputs that are computed together (WIDTH in product.cpp)


class NativeLinear:
    """A Linear in C++. Takes the memory of `weight` (out, in) over and packs it in place."""

    min_rows = 1

    def __init__(self, weight: torch.Tensor, n_chunks: int, library: CDLL):
        self.n_out, self.n_in = weight.shape
        self.n_chunks, self.dtype = n_chunks, weight.dtype
        if self.n_out % BLOCK:
            self.weight = F.pad(weight, (0, 0, 0, -self.n_out % BLOCK))
        else:
            self.weight = weight.contiguous()
        ending = DTYPES[weight.dtype]
        self._product = getattr(library, f"product_{ending}")
        self._take_rows = getattr(library, f"take_rows_{ending}")
        getattr(library, f"pack_{ending}")(self.weight.data_ptr(), *self.weight.shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(x), self.n_out), dtype=self.dtype)
        self._times(x, None, out.data_ptr())
        return out

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((len(x), self.n_out), dtype=torch.float32)
        self._times(x, out.data_ptr(), None)
        return out

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        out, ids = torch.empty((len(ids), self.n_in), dtype=self.dtype), ids.contiguous()
        if not self._take_rows(
            self.weight.data_ptr(), ids.data_ptr(), out.data_ptr(), len(ids), self.n_out, self.n_in
        ):
            raise IndexError(f"a token id is not below {self.n_out}")
        return out

    def _times(self, x: torch.Tensor, sums: int | None, out: int | None) -> None:
        """One of the addresses is given: of fp32 sums, or of the result in the dtype."""
        x = x.contiguous()
        self._product(
            x.data_ptr(),
            self.weight.data_ptr(),
            sums,
            out,
            len(x),
            self.n_in,
            self.n_out,
            self.n_chunks,
        )


class NativeLinears:
    """The LinearBackend of the C++ products.

    Args:
        together: inputs that are multiplied together; a K-chunk has a multiple of so many.
    """

    name = "C++"

    def __init__(self, library: CDLL, together: int):
        self.library, self.together = library, together

    def takes(self, n_in: int, n_chunks: int) -> bool:
        return n_in % (n_chunks * self.together) == 0

    def linear(self, weight: torch.Tensor, n_chunks: int = 1) -> NativeLinear:
        return NativeLinear(weight, n_chunks, self.library)

    def embedding(self, weight: torch.Tensor) -> NativeLinear:
        return NativeLinear(weight, 1, self.library)

    def padded_rows(self, n: int) -> int:
        return n


def inputs_together(library: CDLL, dtype: torch.dtype) -> int:
    """What `together` is on this machine; 0 where oneDNN does better: on CPUs that multiply whole
    tiles (AMX)."""
    return getattr(library, f"inputs_together_{DTYPES[dtype]}")()
