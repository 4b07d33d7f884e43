"""The arithmetic between the products as few kernels, made by torch.compile: in plain torch a layer
launches some thirty small ones, 2-3 us each on a GPU even when replayed from a graph, next to 100
us for the products of an 8B layer.

For CUDA, and not in deterministic mode: a compiled sum may take another order for another number of
rows. On CPU the C++ kernels do the same; the tests compile for CPU. Never run on a GPU so far.
"""

from collections.abc import Callable
from typing import Any

import torch

from llama_tp.backends.base import Elementwise, LayerShape

# one row gets code of its own; from the second number on it is unknown to the compiler
ROWS = (1, 3)
# a rounding or two at 4, as large as samples get
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.1}


class CompiledElementwise:
    """An Elementwise that computes what `plain` does, compiled."""

    name = "torch.compile"

    def __init__(
        self, plain: Elementwise, compiler: Callable[..., Callable[..., Any]] = torch.compile
    ):
        # in this process, since a helper of the compiler's would outlive a rank that is killed
        options = {"compile_threads": 1}
        self.add_norm = compiler(plain.add_norm, options=options)
        self.rotate = compiler(plain.rotate, options=options)
        self.silu_mul = compiler(plain.silu_mul, options=options)


def try_compiled(
    plain: Elementwise,
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    compiler: Callable[..., Callable[..., Any]] = torch.compile,
) -> CompiledElementwise | str:
    """`plain` compiled, once it gave what `plain` gives, in the shapes, strides and kinds of tensor
    that it will have; or why not. Takes 10-20 s the first time on a machine and less from then on
    (the compiler keeps its results in a folder)."""
    try:
        compiled = CompiledElementwise(plain, compiler)
        return _difference(compiled, plain, shape, dtype, device) or compiled
    except Exception as e:  # whatever a compiler can throw: the plain way always works
        return f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"


@torch.inference_mode()
def _difference(
    ours: Elementwise,
    theirs: Elementwise,
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Where a compiled function is off, and by how much."""
    for n_rows in ROWS:
        # add_norm changes its own
        samples = zip(
            _samples(shape, n_rows, dtype, device), _samples(shape, n_rows, dtype, device)
        )
        for (name, mine), (_, other) in samples:
            off = (getattr(ours, name)(*mine) - getattr(theirs, name)(*other)).abs().max().item()
            if not off <= CLOSE[dtype]:  # NaN included
                return f"{name} of {n_rows} row(s) is off by {off:.2g}"
    return None


def _samples(
    shape: LayerShape, n_rows: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, tuple[Any, ...]]]:
    """The arguments that the model calls each function with."""
    H, K, E = shape.n_heads, shape.n_kv_heads, shape.head_dim

    def some(*sizes: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(n_rows)
        return torch.randn(n_rows, *sizes, generator=generator).to(device, dtype)

    angles = torch.rand(n_rows, 1, E // 2, generator=torch.Generator().manual_seed(n_rows))
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    with torch.inference_mode(False):  # as weights are made: the compiler tells the two apart
        weight = torch.ones(shape.dim, dtype=dtype, device=device)
    x = some(shape.dim)
    return [
        ("add_norm", (x, None, weight, shape.norm_eps)),
        ("add_norm", (x, x.flip(1), weight, shape.norm_eps)),
        ("rotate", (some(H + 2 * K, E)[:, : H + K], cos, sin)),
        ("silu_mul", (some(2 * shape.ffn_dim),)),
    ]
