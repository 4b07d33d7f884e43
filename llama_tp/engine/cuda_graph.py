"""Steps of nothing but decodes, captured while loading and replayed: one launch for the model, its
collectives and the sampling, where a GPU would otherwise wait for some thousand launches from
Python (an 8B model: 1,100).

A captured step reads its inputs from tensors that stay where they are, and its tokens never visit
the host. A step takes the smallest captured one that holds it, with rows of padding; where none
does, it runs as any other. `Record` is the seam: `CudaRecord` captures CUDA graphs; the tests'
record runs the same body eagerly on CPU.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from llama_tp.backends.base import ForwardBatch
from llama_tp.backends.kv_cache import KVCache, Slots, on_device
from llama_tp.engine.step import FILTERED, GATHERED, GREEDY, WHOLE, Draw, Step, StepRow
from llama_tp.model.llama import Transformer
from llama_tp.parallel.collectives import which_ranks

OnShards = Callable[[torch.Tensor, frozenset[int], torch.Tensor | None], torch.Tensor]
N_FIELDS = 2 + len(Draw._fields)  # of a row's inputs: row, position, draw
ONE = 0x3FF0000000000000  # the bits of 1.0
UNFILTERED = Draw(ONE, 1, ONE, 0, 0)  # stands in greedy rows among filtered ones: top_k 1
# what can come together in a step
WAYS = tuple(map(frozenset, ((GREEDY,), (FILTERED,), (WHOLE,), (FILTERED, WHOLE))))
CAPTURE_LIMIT_S = 60.0  # of loading: sizes that are not captured by then never are


class Record(Protocol):
    """What captures."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Runs the body once, where `capture` will: libraries set themselves up at their first
        call, which no graph may hold."""

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        """-> what runs the body's work again. Nothing is computed meanwhile."""

    def release(self) -> None:
        """Drops all that was captured."""


class Key(NamedTuple):
    """What a captured step can hold: so many rows, block tables so wide, these ways to sample."""

    size: int
    width: int
    ways: frozenset[int]


@dataclass(frozen=True)
class Captured:
    """One captured step: its static inputs (B, N_FIELDS) int64 and tokens (B,) int64, and what runs
    it."""

    inputs: torch.Tensor
    tokens: torch.Tensor
    replay: Callable[[], None]


def sizes(max_rows: int, floor: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, 8 and from there every eighth, so that few rows are
    computed in vain; none below `floor` (Transformer.min_rows)."""
    return sorted(
        {max(n, floor) for n in (1, 2, 4, *range(8, max_rows, 8), max_rows) if n <= max_rows}
    )


class DecodeGraphs:
    """The captured steps of one rank.

    Args:
        last: (rows + 1,) int64, what each row sampled last; the one more is padding's.
        on_shards: samples without the host: (B, D), the ways that occur, draws (B, 5) or None ->
            (B,).
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        last: torch.Tensor,
        on_shards: OnShards,
        record: Record,
    ):
        self.model, self.cache, self.last, self.on_shards, self.record = (
            model,
            cache,
            last,
            on_shards,
            record,
        )
        self.n_rows = len(last) - 1
        # writes to the trash block
        self.padding = torch.tensor([[self.n_rows, 0, *UNFILTERED]], device=last.device)
        width = -(-model.n_positions // cache.block_size)
        self.tables = torch.full(
            (len(last), width), cache.empty, dtype=torch.int32, device=last.device
        )
        self.tables[-1] = cache.trash
        self.n_blocks = [1] * self.n_rows  # of each row's table
        self.captured: dict[Key, Captured] = {}  # from small to large, once `capture` is done

    @torch.inference_mode()
    def capture(self) -> str | None:
        """Every rank, while loading: all that may come, or what is captured within CAPTURE_LIMIT_S,
        on all ranks the same; nothing if any rank fails. -> on the first rank that failed, why.

        Raises what a warm-up raises on this rank and not on all: its collectives are then waited
        for in vain.
        """
        started, ranks = time.perf_counter(), self.model.ranks
        for key in self._keys():
            inputs, tokens, body = self._step(key)
            error, failed = None, []
            try:
                self.record.warm_up(body)
            except Exception as e:
                error = e
            failed = which_ranks(error is not None, ranks)
            if error is not None and len(failed) < ranks.tp:
                raise error
            if not failed:  # from here on no rank waits for another
                try:
                    self.captured[key] = Captured(inputs, tokens, self.record.capture(body))
                except Exception as e:
                    error = e
                failed = which_ranks(error is not None, ranks)
            if failed:
                self.release()
                return (
                    f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    if ranks.rank == failed[0]
                    else None
                )
            if which_ranks(time.perf_counter() - started > CAPTURE_LIMIT_S, ranks):
                break
        self.captured = dict(
            sorted(
                self.captured.items(),
                key=lambda item: (item[0].size, item[0].width, len(item[0].ways)),
            )
        )
        return None

    def release(self) -> None:
        """Drops the captured steps. NCCL's destroy waits for every graph that holds one of its
        operations (pytorch #115388)."""
        self.captured.clear()
        self.record.release()

    def own(self, row: StepRow) -> None:
        """Takes in a row's new blocks; what a former owner had beyond them is emptied."""
        end = row.block_start + len(row.blocks)
        blocks = list(row.blocks) + [self.cache.empty] * (
            self.n_blocks[row.row] - end if row.fresh else 0
        )
        at = slice(row.block_start, row.block_start + len(blocks))
        self.tables[row.row, at] = on_device(
            torch.tensor(blocks, dtype=torch.int32), self.last.device
        )
        self.n_blocks[row.row] = end

    def find(self, step: Step) -> Captured | None:
        """The smallest captured step that holds this one: every row decodes, and samples without
        the host."""
        if not all(
            row.decodes and row.sample and row.way != GATHERED and not row.masked
            for row in step.rows
        ):
            return None
        ways = frozenset(row.way for row in step.rows)
        if len(ways) > 1:  # a greedy row among others is drawn as a filtered one
            ways = (ways | {FILTERED}) - {GREEDY}
        longest = max(self.n_blocks[row.row] for row in step.rows)
        return next(
            (
                one
                for key, one in self.captured.items()
                if key.size >= len(step.rows) and key.width >= longest and key.ways >= ways
            ),
            None,
        )

    def run(self, step: Step, one: Captured) -> torch.Tensor:
        """-> (R,) int64, the sampled tokens, in the order of the step's rows."""
        n, size = len(step.rows), len(one.inputs)
        inputs = [(row.row, row.start, *(row.draw or UNFILTERED)) for row in step.rows]
        one.inputs[:n].copy_(on_device(torch.tensor(inputs), self.last.device))
        one.inputs[n:].copy_(self.padding.expand(size - n, N_FIELDS))
        one.replay()
        return one.tokens[:n].clone()

    def _keys(self) -> Iterator[Key]:
        """What is captured, what is needed first before the rest; large sizes first, so that small
        ones find memory to share."""
        for ways in WAYS:
            for size in reversed(sizes(self.n_rows, self.model.min_rows)):
                for width in self.model.backends.attention.table_widths(size, self.tables.shape[1]):
                    yield Key(size, width, ways)

    def _step(self, key: Key) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        """-> the inputs and tokens of a captured step, and its work."""
        size, width, ways = key
        inputs = self.padding.repeat(size, 1)  # (B, N_FIELDS)
        tokens = torch.zeros(size, dtype=torch.int64, device=self.last.device)  # (B,)

        def body() -> None:
            rows, positions = inputs[:, 0], inputs[:, 1]
            table = self.tables[rows, :width]  # (B, W)
            blocks = table.gather(1, (positions // self.cache.block_size).unsqueeze(1))[:, 0].long()
            slots = Slots(blocks, positions % self.cache.block_size)
            plan = self.model.backends.attention.plan_decodes(table, positions)
            # (B, D)
            hidden = self.model(
                ForwardBatch(self.last[rows].clamp(min=0), positions, slots, plan), self.cache
            )
            tokens.copy_(self.on_shards(hidden, ways, None if ways == {GREEDY} else inputs[:, 2:]))
            self.last[rows] = tokens

        return inputs, tokens, body


class CudaRecord:
    """Captures CUDA graphs: all in one memory pool, since no two run at once, and all on one
    stream, since cuBLAS keeps a workspace for every stream that it has seen (32 MiB on Hopper)."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, body: Callable[[], None]) -> None:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            body()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # torch's own block stays on it when a capture was invalidated
        with torch.cuda.stream(self.stream):
            # thread_local: NCCL's watchdog looks at its events meanwhile, which the default would
            # count as an error
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                body()
        self.graphs.append(graph)
        return graph.replay

    def release(self) -> None:
        for graph in self.graphs:
            graph.reset()
        self.graphs.clear()
