"""The arithmetic between the products by the C++ kernels (native/kernels.cpp): CPU, fp32 and
bf16."""

from ctypes import CDLL

import torch

from llama_tp.backends.linear.native import DTYPES


class NativeElementwise:
    """An Elementwise; `rotate` works in place."""

    name = "C++"

    def __init__(self, library: CDLL, dtype: torch.dtype):
        self._add_norm, self._rotate, self._silu_mul = (
            getattr(library, f"{name}_{DTYPES[dtype]}")
            for name in ("add_norm", "rotate", "silu_mul")
        )

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(x)
        self._add_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            *x.shape,
        )
        return out

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        self._rotate(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), *x.shape)
        return x

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        T, twice = gate_up.shape
        out = gate_up.new_empty((T, twice // 2))
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), T, twice // 2)
        return out
