"""Captured decodes behind their seam: what is captured when, what stays where it is, and paged FlashAttention's arguments.

A CUDA graph itself needs a GPU; `tests/engines.py::again` runs the captured body instead, under a guard that refuses what a
graph cannot hold. That tokens stay the same at every tp is in tests/test_house.py.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from llama_tp.engine import build
from llama_tp.engine.build import EngineOptions, pick_kernels, said_aloud
from llama_tp.engine.cuda_graph import ONE, sizes
from llama_tp.engine.request import Request, SamplingParams
from llama_tp.engine.runner import Runner
from llama_tp.engine.step import FILTERED, GREEDY, WHOLE, Draw, Step, StepRow
from llama_tp.model.flash import PagedAttention
from llama_tp.model.kernels import FlashKernels, TorchKernels
from llama_tp.parallel.groups import Ranks, single_rank
from llama_tp.spec.weights import table
from tests import reference
from tests.engines import engine
from tests.flash import Varlen
from tests.shapes import SHRUNK

CONFIG, WIDE = SHRUNK["8b"], SHRUNK["wide"]
WEIGHTS = reference.random_weights(table(CONFIG))
PROMPTS = [[(i * k * k + 5 * k + i) % 260 for k in range(n)] for i, n in enumerate((5, 33, 300), start=1)]


def run(one, n_new: int, **params) -> dict[str, list[int]]:
    for i, ids in enumerate(PROMPTS):
        one.submit(Request(f"{i}", ids, SamplingParams(**{"max_tokens": n_new, "temperature": 0, **params})))
    tokens: dict[str, list[int]] = {}
    while one.has_work:
        for delta in one.step():
            tokens.setdefault(delta.request_id, []).extend(delta.ids)
    one.scheduler.check_integrity()
    return tokens


def test_sizes_leave_few_rows_in_vain_and_keep_the_floor():
    assert sizes(1, 1) == [1] and sizes(5, 1) == [1, 2, 4, 5] and sizes(32, 1) == [1, 2, 4, 8, 16, 24, 32]
    assert sizes(4, 16) == [16] and sizes(32, 16) == [16, 24, 32]


def test_a_size_is_captured_once_and_its_tensors_stay():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, runner=Runner, graphs=True)
    run(one, 6)
    first = dict(one.runner.graphs.captured)
    assert {(key[0], key[2]) for key in first} == {(4, frozenset({GREEDY}))}                        # three rows, padded
    run(one, 6)
    assert one.runner.graphs.captured == first
    run(one, 6, temperature=0.7, top_k=5)
    run(one, 6, temperature=0.7, top_p=1)
    known = {ways for _, _, ways in one.runner.graphs.captured}
    assert known == {frozenset({way}) for way in (GREEDY, FILTERED, WHOLE)}
    one.submit(Request("greedy", PROMPTS[0], SamplingParams(max_tokens=6, temperature=0)))
    run(one, 6, temperature=0.7, top_k=5)
    assert {ways for _, _, ways in one.runner.graphs.captured} == known                             # with others: as filtered


def test_steps_with_prompts_or_driver_chosen_tokens_are_not_replayed():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, runner=Runner, graphs=True)
    run(one, 1)
    run(one, 4, logprobs=1)
    assert not one.runner.graphs.captured


def test_the_step_ahead_is_sent_before_the_last_one_is_read():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, runner=Runner, graphs=True)
    one.submit(Request("0", PROMPTS[0], SamplingParams(max_tokens=5, temperature=0)))
    assert len(one.step()) == 1 and one.n_steps == 1 and len(one.scheduler.in_flight) == 1
    one.submit(Request("1", PROMPTS[1], SamplingParams(max_tokens=5, temperature=0, logprobs=0)))
    one.step()
    assert not one.scheduler.in_flight                              # the driver chooses: nothing is planned ahead
    while one.has_work:
        one.step()
    assert not one.scheduler.in_flight and one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks


def test_a_stop_leaves_nothing_in_flight():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, runner=Runner, graphs=True)
    [expected] = [ids for name, ids in run(one, 4).items() if name == "0"]
    one.submit(Request("stop", PROMPTS[0], SamplingParams(max_tokens=20, temperature=0, stop_ids=[expected[2]])))
    ids = [i for _ in range(20) for delta in one.step() for i in delta.ids]
    assert ids == expected[:2] and not one.scheduler.in_flight and not one.has_work


@pytest.mark.parametrize("step_tokens", [512, 40])
@pytest.mark.parametrize("graphs", [False, True])
def test_paged_flash_attention_is_told_the_right_thing(graphs, step_tokens):
    weights = reference.random_weights(table(WIDE))
    expected = run(engine(single_rank(), WIDE, weights=weights, runner=Runner), 8)
    kernels = FlashKernels(PagedAttention(Varlen("2.13", dtypes=(torch.float32,)), 1, False))
    ours = engine(single_rank(), WIDE, weights=weights, runner=Runner, kernels=kernels, graphs=graphs, n_blocks=8,
                  block_size=kernels.block_size, step_tokens=step_tokens)
    if graphs:
        ours.runner.graphs.record = lambda body: (body(), body)[1]             # the stand-in for the kernel does read values
    assert run(ours, 8) == expected


class NeverWaits(TorchFunctionMode):
    """Refuses what makes the host wait for a device: numbers that travel there without being told not to block."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        assert name != "to" or args[0].is_meta or kwargs.get("non_blocking") or torch.device("meta") not in args[1:], args
        assert name not in ("__getitem__", "__setitem__") or not (args[0].is_meta and isinstance(args[1], list)), args
        assert name not in ("tensor", "as_tensor") or "device" not in kwargs, kwargs
        return function(*args, **kwargs)


FLASH = FlashKernels(PagedAttention(Varlen("2.13"), 1, False))


def test_one_rank_without_flash_attention_is_enough_for_all_to_do_without_and_to_say_so(monkeypatch):
    """Blocks have one size on all ranks."""
    ranks, options = Ranks(0, 4, torch.device("cuda"), room=object()), EngineOptions("")
    monkeypatch.setattr(build, "pick", lambda *args: FLASH)
    monkeypatch.setattr(build, "gather_ints", lambda mine, ranks: [mine, mine, 16, mine])
    kernels = pick_kernels(CONFIG, ranks, torch.bfloat16, False)
    assert type(kernels) is TorchKernels and kernels.block_size == 16
    [said] = said_aloud(options, CONFIG, ranks, torch.bfloat16, 1024, kernels)
    assert said.startswith("attention runs in plain torch, slower") and "rank 2 cannot use it" in said
    monkeypatch.setattr(build, "gather_ints", lambda mine, ranks: [mine] * 4)
    assert pick_kernels(CONFIG, ranks, torch.bfloat16, False) is FLASH
    assert not said_aloud(options, CONFIG, ranks, torch.bfloat16, 1024, FLASH)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kernels, dtype", [(TorchKernels(), torch.float32), (FLASH, torch.bfloat16)], ids=["torch", "flash"])
def test_a_step_needs_no_value_from_the_device_and_does_not_wait_for_it(kernels, dtype, graphs):
    """On the meta device, whose tensors have no values and do not mix with the host's."""
    one = engine(single_rank("meta"), WIDE, dtype, runner=Runner, kernels=kernels, graphs=graphs, block_size=kernels.block_size)
    draws = {GREEDY: None, FILTERED: Draw(ONE, 5, ONE, 0, 7), WHOLE: Draw(ONE, 0, ONE, 0, 7)}
    if graphs:
        one.runner.graphs.record = lambda body: (body(), body)[1]
    with NeverWaits():
        one.runner.run(Step(0, tuple(StepRow(row, 0, 5, (1, 2, 3, 4, 5), True, False, 0, (row,), way, draw)
                                     for row, (way, draw) in enumerate(draws.items()))), None)
        one.runner.run(Step(1, tuple(StepRow(row, 5, 1, (), True, False, 1, (), way, draw)
                                     for row, (way, draw) in enumerate(draws.items()))), None)
    assert one.runner.last.is_meta and (not graphs or len(one.runner.graphs.captured) == 1)
