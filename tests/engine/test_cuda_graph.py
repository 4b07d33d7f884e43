"""Captured decodes behind their seam: what is captured when, what stays where it is, and paged
FlashAttention's arguments.

A CUDA graph itself needs a GPU; `tests/engines.py::Again` runs the captured body instead, under a
guard that refuses what a graph cannot hold. That tokens stay the same at every tp is in
tests/test_invariance.py.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from llama_tp.arch.options import EngineOptions
from llama_tp.arch.weights import table
from llama_tp.backends import select
from llama_tp.backends.attention.flash import FlashAttention
from llama_tp.backends.base import LayerShape
from llama_tp.engine import build, cuda_graph
from llama_tp.engine.build import startup_warnings
from llama_tp.engine.cuda_graph import MODE_SETS, CudaRecord, Key, sizes
from llama_tp.engine.request import Request
from llama_tp.engine.step import Step, StepRow
from llama_tp.engine.worker import Worker
from llama_tp.model import build as model_build
from llama_tp.model.build import choose_backends, plain_backends
from llama_tp.parallel.groups import Ranks, single_rank
from llama_tp.sampling.params import GREEDY_DRAW, SamplingMode, SamplingParams
from tests import reference
from tests.engines import Again, Counting, engine, shard_of
from tests.flash import Varlen
from tests.ranks import run as in_ranks
from tests.shapes import SHRUNK

_, GREEDY, TOP_K_TOP_P, UNFILTERED = SamplingMode
CONFIG, WIDE = SHRUNK["8b"], SHRUNK["wide"]
WEIGHTS = reference.random_weights(table(CONFIG))
PROMPTS = [
    [(i * k * k + 5 * k + i) % 260 for k in range(n)] for i, n in enumerate((5, 33, 300), start=1)
]


def run(one, n_new: int, **params) -> dict[str, list[int]]:
    for i, ids in enumerate(PROMPTS):
        one.submit(
            Request(
                f"{i}", ids, SamplingParams(**{"max_tokens": n_new, "temperature": 0, **params})
            )
        )
    tokens: dict[str, list[int]] = {}
    while one.has_work:
        for delta in one.step():
            tokens.setdefault(delta.request_id, []).extend(delta.ids)
    one.scheduler.check_integrity()
    return tokens


def test_sizes_leave_few_rows_in_vain_and_keep_the_floor():
    assert (
        sizes(1, 1) == [1]
        and sizes(5, 1) == [1, 2, 4, 5]
        and sizes(32, 1) == [1, 2, 4, 8, 16, 24, 32]
    )
    assert sizes(4, 16) == [16] and sizes(32, 16) == [16, 24, 32]


def test_all_is_captured_while_loading_and_nothing_in_traffic():
    one = engine(
        single_rank(), CONFIG, weights=WEIGHTS, worker=Worker, graphs=True, record=Counting
    )
    record, captured = one.worker.graphs.record, dict(one.worker.graphs.captured)
    assert {key.size for key in captured} == {1, 2, 4, 8} and {
        key.modes for key in captured
    } == set(MODE_SETS)
    assert list(captured) == sorted(captured, key=lambda key: (key.size, key.width, len(key.modes)))
    for params in ({}, {"temperature": 0.7, "top_k": 5}, {"temperature": 0.7, "top_p": 1}):
        before = record.n_replayed
        run(one, 6, **params)
        # with others: drawn, as they are
        one.submit(Request("greedy", PROMPTS[0], SamplingParams(max_tokens=6, temperature=0)))
        run(one, 6, **params)
        assert record.n_replayed >= before + 10
    assert one.worker.graphs.captured == captured and record.n_captured == len(captured)


def test_a_step_takes_the_smallest_that_holds_it():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker, graphs=True)
    graphs = one.worker.graphs
    keys = {id(captured): key for key, captured in graphs.captured.items()}
    draw = GREEDY_DRAW._replace(top_k=5, u=7)

    def found(n: int, *modes: SamplingMode) -> tuple | None:
        rows = [
            StepRow(i, 3, 1, (), True, False, 1, (), mode, draw)
            for i, mode in zip(range(n), modes * n)
        ]
        captured = graphs.find(Step(0, tuple(rows)))
        return captured and keys[id(captured)]

    assert found(3, GREEDY) == (4, 32, {GREEDY}) and found(5, UNFILTERED) == (8, 32, {UNFILTERED})
    assert found(2, GREEDY, TOP_K_TOP_P) == (2, 32, {TOP_K_TOP_P}) and found(
        2, GREEDY, UNFILTERED
    ) == (
        2,
        32,
        {TOP_K_TOP_P, UNFILTERED},
    )
    graphs.n_blocks[0] = 33
    assert found(1, GREEDY) == (1, 64, {GREEDY})
    del (
        graphs.captured[Key(4, 32, frozenset({GREEDY}))],
        graphs.captured[Key(4, 64, frozenset({GREEDY}))],
    )
    assert found(3, GREEDY) == (8, 64, {GREEDY})
    graphs.n_blocks[0] = 65
    assert found(1, GREEDY) is None  # too long: as any step


def test_loading_captures_for_a_limited_time_and_the_rest_runs_as_any_step(monkeypatch):
    expected = run(engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker), 6)
    monkeypatch.setattr(cuda_graph, "CAPTURE_LIMIT_S", 0.0)
    one = engine(
        single_rank(),
        CONFIG,
        weights=WEIGHTS,
        worker=Worker,
        graphs=True,
        record=Counting,
        max_rows=2,
    )
    assert one.worker.graphs.record.n_captured == len(one.worker.graphs.captured) == 1
    assert run(one, 6) == expected and one.worker.graphs.record.n_replayed


def failing(ranks, fails_at: str, failing_rank: int):
    """-> why nothing was captured, whether graphs are left, and the tokens."""
    options = {"weights": WEIGHTS, "worker": Worker, "graphs": True}
    one = engine(ranks, CONFIG, record=Counting, **options)
    one.worker.graphs.record = Counting(
        fails_at if failing_rank in (ranks.rank, -1) else "", after=3
    )
    one.worker.graphs.captured = {}
    try:
        why = one.worker.capture()
    except RuntimeError as error:
        return f"raised: {str(error).splitlines()[0]}", None, None
    left, released = len(one.worker.graphs.captured), one.worker.graphs.record.released
    if failing_rank == 1 and fails_at == "warm-up":
        return why, left, None
    if not ranks.is_driver:
        one.follow()
        return why, left, None
    tokens = run(one, 4)
    one.dismiss()
    return why, left, tokens if released else None


@pytest.mark.parametrize("fails_at", ["warm-up", "capture"])
def test_a_capture_that_fails_is_told_and_the_step_runs_as_any(fails_at):
    expected = run(engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker), 4)
    assert failing(single_rank(), fails_at, 0) == (f"RuntimeError: no {fails_at}", 0, expected)


def test_the_start_says_in_one_line_why_nothing_is_captured(monkeypatch, capfd):
    model = engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker).worker.model
    model.ranks = Ranks(0, 1, torch.device("cuda"))
    fake_worker = SimpleNamespace(
        capture=lambda: "RuntimeError: no capture", n_vocab=260, numerators=None
    )
    for name, fake in (
        ("CudaRecord", object),
        ("Worker", lambda *args: fake_worker),
    ):
        monkeypatch.setattr(build, name, fake)
    cache, tokenizer = (
        SimpleNamespace(n_blocks=4, block_size=16),
        SimpleNamespace(n_vocab=260, stop_ids=()),
    )
    assert build.assemble(model, cache, 2, 512, tokenizer, None, False, 1).n_ahead == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "decodes cannot be captured" in line and line.endswith("RuntimeError: no capture")


def test_a_capture_that_fails_on_one_rank_is_given_up_on_all_and_told_once():
    expected = run(engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker), 4)
    assert in_ranks(2, failing, "capture", 1) == [
        (None, 0, expected),
        ("RuntimeError: no capture", 0, None),
    ]
    assert in_ranks(2, failing, "warm-up", -1) == [
        ("RuntimeError: no warm-up", 0, expected),
        (None, 0, None),
    ]


def test_a_warm_up_that_fails_on_one_rank_only_is_a_failure_of_that_rank():
    """Its peers wait for its part of a sum; on CUDA they wait on the device, and their hosts learn
    it here."""
    assert in_ranks(2, failing, "warm-up", 1) == [
        (None, 0, None),
        ("raised: no warm-up", None, None),
    ]


class FakeCuda:
    """torch.cuda as far as CudaRecord uses it: who ran on which stream, and which graphs live."""

    def __init__(self):
        self.n_streams, self.now, self.ran, self.alive = 0, "default", [], set()
        outer = self

        class Stream:
            def __init__(self):
                outer.n_streams += 1

            def wait_stream(self, other):
                assert other == "default"

        class CUDAGraph:
            def replay(self):
                assert self in outer.alive

            def reset(self):
                outer.alive.discard(self)

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        """A capture that was invalidated raises in capture_end, and the stream stays
        (torch/cuda/graphs.py:477, 2.13)."""
        assert pool == "pool" and capture_error_mode == "thread_local"
        before, self.now = self.now, stream
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.now = before
        self.alive.add(graph)

    def current_stream(self):
        return CurrentStream("default")

    def graph_pool_handle(self):
        return "pool"

    def synchronize(self, device):
        self.ran.append(f"synchronize {device}")


class CurrentStream(str):
    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in (
        "Stream",
        "CUDAGraph",
        "stream",
        "graph",
        "current_stream",
        "graph_pool_handle",
        "synchronize",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def invalidated():
    raise RuntimeError("operation not permitted when stream is capturing")


def test_warm_ups_and_captures_share_one_stream(cuda):
    """cuBLAS keeps a workspace for every stream."""
    record, streams = CudaRecord(), set()
    for _ in range(3):
        record.warm_up(lambda: streams.add(cuda.now))
        record.capture(lambda: streams.add(cuda.now))
    assert streams == {record.stream} and cuda.n_streams == 1 and len(cuda.alive) == 3
    with pytest.raises(RuntimeError, match="previous error during capture"):
        record.capture(invalidated)
    # what runs from now on does not run there
    assert cuda.now == "default" and len(cuda.alive) == 3
    record.release()
    assert not cuda.alive


def test_graphs_are_dropped_and_the_device_is_done_before_the_groups_are_destroyed(
    cuda, monkeypatch
):
    """NCCL's destroy spins while a captured graph holds one of its operations (pytorch #115388)."""

    def destroy():
        assert not cuda.alive, "would spin"
        cuda.ran.append("destroy")

    one = engine(
        single_rank(),
        CONFIG,
        weights=WEIGHTS,
        worker=Worker,
        graphs=True,
        record=CudaRecord,
        max_rows=2,
    )
    assert len(cuda.alive) == len(one.worker.graphs.captured) > 0
    one.ranks, one.watch, one.dismissed = (
        Ranks(0, 2, torch.device("cuda", 1), group=object()),
        SimpleNamespace(close=int),
        True,
    )
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", destroy)
    one.close()
    assert cuda.ran == ["synchronize cuda:1", "destroy"] and not one.worker.graphs.captured


def test_steps_with_prompts_or_driver_chosen_tokens_are_not_replayed():
    one = engine(
        single_rank(), CONFIG, weights=WEIGHTS, worker=Worker, graphs=True, record=Counting
    )
    run(one, 1)
    run(one, 4, logprobs=1)
    assert not one.worker.graphs.record.n_replayed


def test_the_step_ahead_is_sent_before_the_last_one_is_read():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker, graphs=True)
    one.submit(Request("0", PROMPTS[0], SamplingParams(max_tokens=5, temperature=0)))
    assert len(one.step()) == 1 and one.n_steps == 1 and len(one.scheduler.in_flight) == 1
    one.submit(Request("1", PROMPTS[1], SamplingParams(max_tokens=5, temperature=0, logprobs=0)))
    one.step()
    assert not one.scheduler.in_flight  # the driver chooses: nothing is planned ahead
    while one.has_work:
        one.step()
    assert (
        not one.scheduler.in_flight and one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks
    )


def test_a_stop_leaves_nothing_in_flight():
    one = engine(single_rank(), CONFIG, weights=WEIGHTS, worker=Worker, graphs=True)
    [expected] = [ids for name, ids in run(one, 4).items() if name == "0"]
    one.submit(
        Request(
            "stop", PROMPTS[0], SamplingParams(max_tokens=20, temperature=0, stop_ids=[expected[2]])
        )
    )
    ids = [i for _ in range(20) for delta in one.step() for i in delta.ids]
    assert ids == expected[:2] and not one.scheduler.in_flight and not one.has_work


def with_flash(function, ranks, dtype):
    """Plain backends, but for attention by `function`."""
    shard = shard_of(WIDE, ranks)
    shape = LayerShape.of(shard, False)
    flash = FlashAttention(function, 1, False, shape, dtype, ranks.device)
    return replace(plain_backends(shard, ranks, dtype), attention=flash)


class Unguarded(Again):
    """For kernels that read values, as the stand-in for FlashAttention does."""

    guard = contextlib.nullcontext


@pytest.mark.parametrize("step_tokens", [512, 40])
@pytest.mark.parametrize("graphs", [False, True])
def test_paged_flash_attention_is_told_the_right_thing(graphs, step_tokens):
    weights = reference.random_weights(table(WIDE))
    expected = run(engine(single_rank(), WIDE, weights=weights, worker=Worker), 8)
    function = Varlen("2.13", dtypes=(torch.float32,))
    backends = with_flash(function, single_rank(), torch.float32)
    ours = engine(
        single_rank(),
        WIDE,
        weights=weights,
        worker=Worker,
        backends=backends,
        graphs=graphs,
        n_blocks=8,
        block_size=backends.block_size,
        step_tokens=step_tokens,
        record=Unguarded,
    )
    assert run(ours, 8) == expected


class NeverWaits(TorchFunctionMode):
    """Refuses what makes the host wait for a device: numbers that travel there without being told
    not to block."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        assert (
            name != "to"
            or args[0].is_meta
            or kwargs.get("non_blocking")
            or torch.device("meta") not in args[1:]
        ), args
        assert name not in ("__getitem__", "__setitem__") or not (
            args[0].is_meta and isinstance(args[1], list)
        ), args
        assert name not in ("tensor", "as_tensor") or "device" not in kwargs, kwargs
        return function(*args, **kwargs)


def test_one_rank_without_flash_attention_is_enough_for_all_to_do_without_and_to_say_so(
    monkeypatch,
):
    """Blocks have one size on all ranks."""
    ranks, options = Ranks(0, 4, torch.device("cuda"), communicator=object()), EngineOptions("")
    flash = with_flash(Varlen("2.13"), ranks, torch.bfloat16).attention
    monkeypatch.setattr(select, "open_flash", lambda *args: flash)
    monkeypatch.setattr(model_build, "which_ranks", lambda mine, ranks: [2])
    backends = choose_backends(shard_of(CONFIG, ranks), ranks, torch.bfloat16, False)
    assert backends.attention is not flash and backends.block_size == 16
    [said] = startup_warnings(
        options, shard_of(CONFIG, ranks), ranks, torch.bfloat16, 1024, backends
    )
    assert (
        said.startswith("attention runs in plain torch, slower") and "rank 2 cannot use it" in said
    )
    monkeypatch.setattr(model_build, "which_ranks", lambda mine, ranks: [])
    backends = choose_backends(shard_of(CONFIG, ranks), ranks, torch.bfloat16, False)
    assert backends.attention is flash and backends.block_size == 256
    assert not startup_warnings(
        options, shard_of(CONFIG, ranks), ranks, torch.bfloat16, 1024, backends
    )


def no_masks():
    pytest.fail("no row is masked")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    "flash, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["torch", "flash"]
)
def test_a_step_needs_no_value_from_the_device_and_does_not_wait_for_it(flash, dtype, graphs):
    """On the meta device, whose tensors have no values and do not mix with the host's."""
    ranks = single_rank("meta")
    plain = plain_backends(shard_of(WIDE, ranks), ranks, dtype)
    backends = with_flash(Varlen("2.13"), ranks, dtype) if flash else plain
    one = engine(
        ranks,
        WIDE,
        dtype,
        worker=Worker,
        backends=backends,
        graphs=graphs,
        block_size=backends.block_size,
        record=Unguarded,
    )
    draws = {
        GREEDY: None,
        TOP_K_TOP_P: GREEDY_DRAW._replace(top_k=5, u=7),
        UNFILTERED: GREEDY_DRAW._replace(top_k=0, u=7),
    }
    with NeverWaits():
        one.worker.run(
            Step(
                0,
                tuple(
                    StepRow(row, 0, 5, (1, 2, 3, 4, 5), True, False, 0, (row,), mode, draw)
                    for row, (mode, draw) in enumerate(draws.items())
                ),
            ),
            None,
            no_masks,
        )
        one.worker.run(
            Step(
                1,
                tuple(
                    StepRow(row, 5, 1, (), True, False, 1, (), mode, draw)
                    for row, (mode, draw) in enumerate(draws.items())
                ),
            ),
            None,
            no_masks,
        )
    assert one.worker.last.is_meta
