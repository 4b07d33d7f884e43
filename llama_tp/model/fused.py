"""The arithmetic between the products as few kernels, made by torch.compile: in plain torch a layer
launches some thirty small ones, 2-3 us each on a GPU even when replayed from a graph, next to 100
us for the products of an 8B layer.

For CUDA, and not in deterministic mode: a compiled sum may take another order for another number of
rows. On CPU the C++ kernels do the same; the tests compile for CPU. Never run on a GPU so far.
"""

from collections.abc import Callable

import torch

from llama_tp.model.rope import Turn
from llama_tp.model.transformer import Transformer
from llama_tp.parallel.collectives import which_ranks

# one row gets code of its own; from the second number on it is unknown to the compiler
ROWS = (1, 3)
NAMES = ("add_norm", "rotate", "silu_mul")
# a rounding or two at 4, as large as samples get
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.1}


@torch.inference_mode()
def fuse(model: Transformer, compiler: Callable[..., Callable] = torch.compile) -> str | None:
    """Every rank: has `model.kernels` compute `NAMES` compiled, once each gave on every rank what
    it gives uncompiled.

    Takes 10-20 s the first time on a machine and less from then on (the compiler keeps its results
    in a folder); in this process, since a helper of the compiler's would outlive a rank that is
    killed. -> on the first rank that failed, why; then none changes.
    """
    kernels, compiled, why = model.kernels, {}, None
    try:
        compiled = {
            name: compiler(getattr(kernels, name), options={"compile_threads": 1}) for name in NAMES
        }
        why = _differs(model, compiled)
    except Exception as e:  # whatever a compiler can throw: the plain way always works
        why = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
    failed = which_ranks(why is not None, model.ranks)
    if failed:
        return why if failed[0] == model.ranks.rank else None
    vars(kernels).update(compiled)
    kernels.name += " + torch.compile"
    return None


def _differs(model: Transformer, compiled: dict[str, Callable]) -> str | None:
    """Where a compiled function is off, and by how much."""
    for n_rows in ROWS:
        # add_norm changes its own
        for (name, ours), (_, theirs) in zip(_samples(model, n_rows), _samples(model, n_rows)):
            off = (compiled[name](*ours) - getattr(model.kernels, name)(*theirs)).abs().max().item()
            if not off <= CLOSE[model.dtype]:  # NaN included
                return f"{name} of {n_rows} row(s) is off by {off:.2g}"
    return None


def _samples(model: Transformer, n_rows: int) -> list[tuple[str, tuple]]:
    """What the model calls each function with, in the shapes, strides and kinds of tensor that it
    will have."""
    first, turn = model.layers[0], model.rope.at(torch.arange(n_rows, device=model.ranks.device))
    H, K, E, ffn = first.attention.H, first.attention.K, first.attention.E, first.feed_forward.ffn

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(n_rows, *shape, generator=torch.Generator().manual_seed(n_rows)).to(
            model.ranks.device, model.dtype
        )

    norm, eps = first.attention_norm.weight, first.attention_norm.eps
    x = some(model.config.dim)
    return [
        ("add_norm", (x, None, norm, eps)),
        ("add_norm", (x, x.flip(1), norm, eps)),
        ("rotate", (some(H + 2 * K, E)[:, : H + K], Turn(*turn))),
        ("silu_mul", (some(2 * ffn),)),
    ]
