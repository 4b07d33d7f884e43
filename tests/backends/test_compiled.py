"""The arithmetic between the products through torch.compile, here for CPU: the same Python, guards
and shapes as on CUDA."""

import re

import pytest
import torch
from torch._dynamo.utils import counters

from llama_tp.backends.base import LayerShape
from llama_tp.backends.select import Backends, with_compiled
from llama_tp.engine.request import Request, SamplingParams
from llama_tp.model.build import peers_of, plain_backends
from llama_tp.parallel.groups import single_rank
from tests.engines import engine, shard_of
from tests.ranks import run
from tests.shapes import SHRUNK

CONFIG = SHRUNK["8b"]
PROMPTS = [
    [(i * k * k + 5 * k + i) % 260 for k in range(n)] for i, n in enumerate((5, 33, 300), start=1)
]


def compiled(ranks, dtype=torch.float32, **how) -> Backends:
    shard = shard_of(CONFIG, ranks)
    shape, plain = LayerShape.of(shard, False), plain_backends(shard, ranks, dtype)
    return with_compiled(plain, ranks.device, dtype, shape, peers_of(ranks), **how)


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
    ranks = single_rank()
    plain = logits(engine(ranks, CONFIG, dtype, fast=False))
    backends = compiled(ranks, dtype)
    assert backends.not_taken == () and backends.name == "torch + torch.compile"
    n_graphs = counters["stats"]["unique_graphs"]
    ours = logits(engine(ranks, CONFIG, dtype, backends=backends))
    # each in the shapes it was tried in
    assert n_graphs >= 3 and counters["stats"]["unique_graphs"] == n_graphs
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
    [(fails, "RuntimeError: no compiler here$"), (errs, "add_norm of 1 row.* off by 1$")],
)
def test_what_cannot_be_compiled_stays_as_it_is(compiler, reason):
    backends = compiled(single_rank(), compiler=compiler)
    assert len(backends.not_taken) == 1 and re.search(reason, backends.not_taken[0])
    assert backends.name == "torch"


def compiled_on_one(ranks) -> tuple:
    backends = compiled(ranks, compiler=fails if ranks.rank else lambda function, options: function)
    return backends.not_taken, backends.name


def test_what_cannot_be_compiled_on_one_rank_stays_on_all_and_is_told_once():
    (first, *names), (second, *others) = run(2, compiled_on_one)
    assert names == others == ["torch"] and first == ()
    assert len(second) == 1 and second[0].endswith("RuntimeError: no compiler here")
