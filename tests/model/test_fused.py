"""The arithmetic between the products through torch.compile, here for CPU: the same Python, guards
and shapes as on CUDA."""

import re

import pytest
import torch
from torch._dynamo.utils import counters

from llama_tp.engine.request import Request, SamplingParams
from llama_tp.model.fused import NAMES, fuse
from llama_tp.model.kernels import TorchKernels
from llama_tp.parallel.groups import single_rank
from tests.engines import engine
from tests.ranks import run
from tests.shapes import SHRUNK

CONFIG = SHRUNK["8b"]
PROMPTS = [
    [(i * k * k + 5 * k + i) % 260 for k in range(n)] for i, n in enumerate((5, 33, 300), start=1)
]


def engine_with(kernels, dtype=torch.float32, ranks=None):
    return engine(ranks or single_rank(), CONFIG, dtype, kernels=kernels)


def logits(one) -> dict:
    for i, ids in enumerate(PROMPTS):
        # ends with one row alone
        one.submit(Request(f"{i}", ids, SamplingParams(max_tokens=1 + 3 * i, temperature=0)))
        one.step()
    while one.has_work:
        one.step()
    return one.seen


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_compiled_arithmetic_gives_what_plain_torch_gives_and_is_compiled_once(dtype, close):
    one, plain = engine_with(TorchKernels(), dtype), logits(engine_with(TorchKernels(), dtype))
    assert (
        fuse(one.runner.model) is None and one.runner.model.kernels.name == "torch + torch.compile"
    )
    n_graphs = counters["stats"]["unique_graphs"]
    ours = logits(one)
    # each in the shapes it was tried in
    assert n_graphs >= len(NAMES) and counters["stats"]["unique_graphs"] == n_graphs
    first = {key: values for key, values in ours.items() if key[2] == len(PROMPTS[int(key[0])])}
    assert len(first) == len(PROMPTS)  # later ones have other tokens where a rounding decides
    for key, values in first.items():
        torch.testing.assert_close(values, plain[key], rtol=close, atol=close)


def fails(function, options):
    raise RuntimeError("no compiler here\nand much more about it")


def errs(function, options):
    return lambda *arguments: function(*arguments) + 1


@pytest.mark.parametrize(
    "compiler, reason",
    [(fails, "RuntimeError: no compiler here"), (errs, "add_norm of 1 row.* off by 1")],
)
def test_what_cannot_be_compiled_stays_as_it_is(compiler, reason):
    one = engine_with(TorchKernels())
    why = fuse(one.runner.model, compiler)
    assert why and re.search(reason, why)
    assert (
        not set(NAMES) & set(vars(one.runner.model.kernels))
        and one.runner.model.kernels.name == "torch"
    )


def compiled_on_one(ranks) -> tuple:
    one = engine_with(TorchKernels(), ranks=ranks)
    why = fuse(one.runner.model, fails if ranks.rank else lambda function, options: function)
    return why, one.runner.model.kernels.name


def test_what_cannot_be_compiled_on_one_rank_stays_on_all_and_is_told_once():
    assert run(2, compiled_on_one) == [(None, "torch"), ("RuntimeError: no compiler here", "torch")]
