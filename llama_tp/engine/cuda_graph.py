"""Steps of nothing but decodes, captured once per batch size and replayed: one launch for the model, its collectives and
the sampling, where a GPU would otherwise wait for some thousand launches from Python (an 8B model: 1,100).

A captured step reads its inputs from tensors that stay where they are, and its tokens never visit the host. `Record` is
the seam: `cuda_record` captures a CUDA graph; the tests' record runs the same body eagerly on CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama_tp.engine.step import FILTERED, GATHERED, GREEDY, Draw, Step, StepRow
from llama_tp.model.kv_cache import KVCache, Slots, on_device
from llama_tp.model.layer import Batch
from llama_tp.model.transformer import Transformer

Record = Callable[[Callable[[], None]], Callable[[], None]]      # runs once with padding, then -> what replays it
OnShards = Callable[[torch.Tensor, frozenset[int], torch.Tensor | None], torch.Tensor]
N_FIELDS = 2 + len(Draw._fields)                                # of a row's inputs: row, position, draw
ONE = 0x3FF0000000000000                                        # the bits of 1.0
UNFILTERED = Draw(ONE, 1, ONE, 0, 0)                            # stands in greedy rows among filtered ones: top_k 1


@dataclass(frozen=True)
class Captured:
    """One captured step: its static inputs (B, N_FIELDS) int64 and tokens (B,) int64, and what runs it."""

    inputs: torch.Tensor
    tokens: torch.Tensor
    replay: Callable[[], None]


def sizes(max_rows: int, floor: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, 8 and from there every eighth, so that few rows are computed in vain; none
    below `floor` (Transformer.rows_floor)."""
    return sorted({max(n, floor) for n in (1, 2, 4, *range(8, max_rows, 8), max_rows) if n <= max_rows})


class DecodeGraphs:
    """The captured steps of one rank, made when their size first occurs.

    Args:
        last: (rows + 1,) int64, what each row sampled last; the one more is padding's.
        on_shards: samples without the host: (B, D), the ways that occur, draws (B, 5) or None -> (B,).
    """

    def __init__(self, model: Transformer, cache: KVCache, last: torch.Tensor, on_shards: OnShards, record: Record):
        self.model, self.cache, self.last, self.on_shards, self.record = model, cache, last, on_shards, record
        self.n_rows = len(last) - 1
        self.sizes = sizes(self.n_rows, model.rows_floor)
        self.padding = torch.tensor([[self.n_rows, 0, *UNFILTERED]], device=last.device)    # writes to the trash block
        width = -(-len(model.rope.cos) // cache.block_size)
        self.tables = torch.full((len(last), width), cache.empty, dtype=torch.int32, device=last.device)
        self.tables[-1] = cache.trash
        self.n_blocks = [1] * self.n_rows                       # of each row's table
        self.captured: dict[tuple[int, int, frozenset[int]], Captured] = {}

    def own(self, row: StepRow) -> None:
        """Takes in a row's new blocks; what a former owner had beyond them is emptied."""
        end = row.block_start + len(row.blocks)
        blocks = list(row.blocks) + [self.cache.empty] * (self.n_blocks[row.row] - end if row.fresh else 0)
        at = slice(row.block_start, row.block_start + len(blocks))
        self.tables[row.row, at] = on_device(torch.tensor(blocks, dtype=torch.int32), self.last.device)
        self.n_blocks[row.row] = end

    def hold(self, step: Step) -> bool:
        """Whether a step can be replayed: every row decodes, and samples without the host."""
        return all(row.decodes and row.sample and row.way != GATHERED and not row.masked for row in step.rows)

    def run(self, step: Step) -> torch.Tensor:
        """-> (R,) int64, the sampled tokens, in the order of the step's rows."""
        n, ways = len(step.rows), frozenset(row.way for row in step.rows)
        if len(ways) > 1:                                       # a greedy row among others is drawn as a filtered one
            ways = (ways | {FILTERED}) - {GREEDY}
        size = next(size for size in self.sizes if size >= n)
        longest = max(self.n_blocks[row.row] for row in step.rows)
        key = (size, self.model.kernels.table_width(longest, self.tables.shape[1]), ways)
        if key not in self.captured:
            self.captured[key] = self._capture(*key)
        one = self.captured[key]
        inputs = [(row.row, row.start, *(row.draw or UNFILTERED)) for row in step.rows]
        one.inputs[:n].copy_(on_device(torch.tensor(inputs), self.last.device))
        one.inputs[n:].copy_(self.padding.expand(size - n, N_FIELDS))
        one.replay()
        return one.tokens[:n].clone()

    def _capture(self, size: int, width: int, ways: frozenset[int]) -> Captured:
        inputs = self.padding.repeat(size, 1)                                            # (B, N_FIELDS)
        tokens = torch.zeros(size, dtype=torch.int64, device=self.last.device)          # (B,)

        def body() -> None:
            rows, positions = inputs[:, 0], inputs[:, 1]
            table = self.tables[rows, :width]                                           # (B, W)
            blocks = table.gather(1, (positions // self.cache.block_size).unsqueeze(1))[:, 0].long()
            slots = Slots(blocks, positions % self.cache.block_size)
            plan = self.model.kernels.plan_decodes(table, positions)
            hidden = self.model(Batch(self.last[rows].clamp(min=0), positions, slots, plan), self.cache)    # (B, D)
            tokens.copy_(self.on_shards(hidden, ways, None if ways == {GREEDY} else inputs[:, 2:]))
            self.last[rows] = tokens
        return Captured(inputs, tokens, self.record(body))


def cuda_record() -> Record:
    """Captures CUDA graphs that share one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(body: Callable[[], None]) -> Callable[[], None]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            body()                      # cuBLAS and NCCL set themselves up at their first call, which no graph may hold
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog looks at its events meanwhile, which the default would count as an error
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            body()
        return graph.replay
    return record
