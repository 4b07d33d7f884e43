"""Products in C++ with packed weights (native/product.cpp): CPU, fp32 and bf16.

Each sum is one chain of fp32 steps over K, whatever the number of rows, outputs and threads, so
that a row's bits are its own by construction. A product in K-chunks is a chain for each, added in
fp32 as one binary tree, in the same pass.
"""

import torch
import torch.nn.functional as F

from llama_tp.native.calls import Functions, padded


class NativeLinear:
    """A Linear in C++. Takes the memory of `weight` (out, in) over and packs it in place."""

    min_rows = 1

    def __init__(self, weight: torch.Tensor, n_chunks: int, functions: Functions):
        self.n_out, self.n_chunks, self.functions = len(weight), n_chunks, functions
        n_more = padded(self.n_out) - self.n_out
        self.weight = F.pad(weight, (0, 0, 0, n_more)) if n_more else weight.contiguous()
        functions.pack(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.functions.product(x.contiguous(), self.weight, self.n_out, self.n_chunks)

    def partial_sums(self, x: torch.Tensor) -> torch.Tensor:
        return self.functions.partial_sums(x.contiguous(), self.weight, self.n_out, self.n_chunks)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return self.functions.embedding(self.weight, ids.contiguous(), self.n_out)


class NativeLinears:
    """The LinearBackend of the C++ products, on a machine where they are worth it
    (functions.inputs_together is not 0)."""

    name = "C++"

    def __init__(self, functions: Functions):
        self.functions = functions

    def takes(self, n_in: int, n_chunks: int) -> bool:
        return n_in % (n_chunks * self.functions.inputs_together) == 0

    def linear(self, weight: torch.Tensor, n_chunks: int = 1) -> NativeLinear:
        return NativeLinear(weight, n_chunks, self.functions)

    def embedding(self, weight: torch.Tensor) -> NativeLinear:
        return NativeLinear(weight, 1, self.functions)

    def padded_rows(self, n: int) -> int:
        return n
