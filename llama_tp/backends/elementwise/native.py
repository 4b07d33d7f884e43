"""The arithmetic between the products by the C++ kernels (native/kernels.cpp): CPU, fp32 and
bf16."""

import torch

from llama_tp.native.calls import Functions


class NativeElementwise:
    """An Elementwise; `rotate` works in place."""

    name = "C++"

    def __init__(self, functions: Functions):
        self.functions = functions
        self.add_norm, self.silu_mul = functions.add_norm, functions.silu_mul

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        self.functions.rotate(x, cos, sin)
        return x
