"""One rank's model, cache and rows. A step comes in as plain ints and is run through the model's
shard; the sampled ids stay here and are read by the driver.

The same code runs on every rank; only the DriverCallbacks are the driver's. What a row sampled last
is kept on every rank, so a decode row travels without its token. Nothing here waits for the device
unless the driver has to see logits: the sampled ids are read when the driver asks for them, which
may be one step later.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from llama_tp.backends.base import ForwardBatch, Span
from llama_tp.backends.kv_cache import KVCache, Slots, on_device
from llama_tp.engine.cuda_graph import DecodeGraphs, Record
from llama_tp.engine.step import Step, StepRow
from llama_tp.model.llama import Transformer
from llama_tp.parallel.collectives import broadcast, gather_to_driver
from llama_tp.sampling.numerators import SoftmaxNumerators, numerators_on
from llama_tp.sampling.params import SamplingMode
from llama_tp.sampling.sharded import ShardedSampler

SCORE_ROWS = 64  # prompt positions whose logits exist at once when prompt logprobs are asked for

Choose = Callable[[list[StepRow], torch.Tensor], list[int]]
Score = Callable[[StepRow, int, torch.Tensor], None]
Sampled = Callable[[], dict[int, list[int]]]


@dataclass(frozen=True)
class DriverCallbacks:
    """The driver's part of a step.

    choose: the GATHERED rows that sample and their logits (R, V) fp32 -> one token id each, below
        `n_vocab`.
    score: a row, the first position scored and the logits (n, V) of n consecutive prompt positions.
    V is the checkpoint's whole vocabulary: rows of the head without a token id count in logprobs.
    """

    choose: Choose
    score: Score


class Worker:
    """One rank's part of every step.

    Args:
        max_rows: the most sequences at once; rows are numbered below it.
        n_vocab: ids that may be sampled; the head's rows beyond have no text, or pad the shards.
        record: how steps of nothing but decodes are captured (cuda_graph.py); None: they run as any
            other.
        numerators: how draws sum over the vocabulary; None: the fastest way on this device.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        max_rows: int,
        n_vocab: int,
        record: Record | None = None,
        numerators: SoftmaxNumerators | None = None,
    ):
        self.model, self.cache, self.n_vocab, self.ranks = model, cache, n_vocab, model.ranks
        self.numerators = numerators or numerators_on(model.ranks.device)
        self.sampler = ShardedSampler(self.ranks, n_vocab, self.numerators)
        self.tables: list[list[int]] = [[] for _ in range(max_rows)]
        places, vocab = range(model.shard.map.n_ranks), model.shard.map.vocab
        self.vocab_parts = [vocab.of(place) for place in places]
        self.widest_vocab = max(part.width for part in self.vocab_parts)
        self.planning_s = 0.0  # of the last step: from ints to tensors
        # one more: padding's
        self.last = torch.zeros(max_rows + 1, dtype=torch.int64, device=model.ranks.device)
        self.graphs: DecodeGraphs | None = None
        if record:
            self.graphs = DecodeGraphs(model, cache, self.last, self.sample_sharded, record)

    def capture(self) -> str | None:
        """Every rank, before the first step: captures what decodes will be replayed from. -> why
        not, on one rank."""
        return self.graphs.capture() if self.graphs else None

    def release(self) -> None:
        """Drops what was captured, which the process groups would wait for when they are taken
        down."""
        if self.graphs:
            self.graphs.release()

    @torch.inference_mode()
    def run(
        self,
        step: Step,
        callbacks: DriverCallbacks | None,
        masks: Callable[[], torch.Tensor],
    ) -> Sampled:
        """One step.

        Args:
            callbacks: given on the driver, None elsewhere.
            masks: called once the model has run, on every rank, if any row is masked. It gives
                (masked rows, words) int32: which tokens may come (filters.allowed), in the order of
                the rows.

        Returns what gives, on the driver, row -> the tokens that it sampled, for every row that
        samples; it waits for the device if need be. Today each row has one token; NOT_FINITE or
        SHORTLIST_TOO_SHORT may stand in its place.
        """
        started = time.perf_counter()
        for row in step.rows:
            if row.blocks:
                self._own(row)
        if self.graphs and (captured := self.graphs.find(step)):
            self.planning_s = time.perf_counter() - started
            replayed = self.graphs.run(step, captured)
            return read_later([row.row for row in step.rows], replayed) if callbacks else dict
        batch, ends = self._batch(step)
        self.planning_s = time.perf_counter() - started
        hidden = self.model(batch, self.cache)  # (T, D)
        for row, end in zip(step.rows, ends):
            if row.prompt_logits:
                self._score(row, hidden[end - row.n : end], callbacks)
        alike: dict[tuple[SamplingMode, bool], list[tuple[StepRow, int]]] = {}
        for row, end in zip(step.rows, ends):
            if row.sample:
                alike.setdefault((row.mode, row.masked), []).append((row, end - 1))
        words = masks() if any(masked for _, masked in alike) else torch.empty(0)
        sampled: list[int] = []
        tokens: list[torch.Tensor] = []
        for (mode, masked), some in sorted(alike.items()):
            rows, at = zip(*some)
            sampled += [row.row for row in rows]
            mask = self._masks_of(rows, step, words) if masked else None
            tokens.append(self._sample(mode, rows, hidden[self._tensor(at)], callbacks, mask))
        if not sampled:
            return dict
        everything = torch.cat(tokens)
        self.last[self._tensor(sampled)] = everything
        return read_later(sampled, everything) if callbacks else dict

    def _tensor(self, ints: Sequence[Any]) -> torch.Tensor:
        """int64 on the device."""
        return on_device(torch.tensor(ints), self.ranks.device)

    def _own(self, row: StepRow) -> None:
        """Extends the row's block table; blocks that are not prefix hits are cleared for their new
        owner."""
        table = self.tables[row.row]
        del table[row.block_start :]
        table.extend(row.blocks)
        n_reused = row.start // self.cache.block_size if row.block_start == 0 else 0
        if row.blocks[n_reused:]:
            self.cache.clear(self._tensor(row.blocks[n_reused:]))
        if self.graphs:
            self.graphs.own(row)

    def _batch(self, step: Step) -> tuple[ForwardBatch, list[int]]:
        """The step as tensors, and where each row's tokens end in it."""
        S = self.cache.block_size
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        spans, ends, decodes = [], [], []
        for row in step.rows:
            table, start, n = self.tables[row.row], row.start, row.n
            spans.append(Span(len(ids), start, n, table))
            if row.ids:
                ids += row.ids
                positions += range(start, start + n)
                blocks += [table[p // S] for p in range(start, start + n)]
            else:
                decodes.append((len(ids), row.row))
                ids.append(0)
                positions.append(start)
                blocks.append(table[start // S])
            ends.append(len(ids))
        padding = self.model.padded_rows(len(ids)) - len(ids)
        ids, positions, blocks = (
            ids + [0] * padding,
            positions + [0] * padding,
            blocks + [self.cache.trash] * padding,
        )
        flat = self._tensor([ids, positions, blocks])  # (3, T)
        if decodes:
            at, rows = self._tensor(decodes).T
            # a row that ended meanwhile may have "sampled" NOT_FINITE
            flat[0, at] = self.last[rows].clamp(min=0)
        plan = self.model.backends.attention.plan(spans, self.cache, len(ids))
        return ForwardBatch(flat[0], flat[1], Slots(flat[2], flat[1] % S), plan), ends

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(R, D) -> (R, vocab_size) on the driver, without the rows that pad the shards; None
        elsewhere."""
        mine = self.model.logits(hidden)
        if missing := self.widest_vocab - mine.shape[1]:
            mine = F.pad(mine, (0, missing))  # all ranks must send as much
        shards = gather_to_driver(mine, self.ranks)
        if shards is None:
            return None
        parts = zip(shards, self.vocab_parts)
        return torch.cat([shard[:, : len(part)] for shard, part in parts], dim=-1)

    def _score(self, row: StepRow, hidden: torch.Tensor, callbacks: DriverCallbacks | None) -> None:
        for at in range(0, row.n, SCORE_ROWS):
            logits = self._logits(hidden[at : at + SCORE_ROWS])
            if callbacks is not None and logits is not None:
                callbacks.score(row, row.start + at, logits)

    def _sample(
        self,
        mode: SamplingMode,
        rows: tuple[StepRow, ...],
        hidden: torch.Tensor,
        callbacks: DriverCallbacks | None,
        masks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token for each row of one mode. hidden: (R, D); masks: (R, words) or None -> (R,)
        int64."""
        if mode == SamplingMode.GATHERED:
            return self._choose(rows, hidden, callbacks)
        greedy = mode == SamplingMode.GREEDY
        draws = None if greedy else self._tensor([row.draw for row in rows])
        return self.sample_sharded(hidden, frozenset((mode,)), draws, masks)

    def _masks_of(self, rows: tuple[StepRow, ...], step: Step, masks: torch.Tensor) -> torch.Tensor:
        order = [row.row for row in step.rows if row.masked]
        return on_device(masks[[order.index(row.row) for row in rows]], self.ranks.device)

    def sample_sharded(
        self,
        hidden: torch.Tensor,
        modes: frozenset[SamplingMode],
        draws: torch.Tensor | None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ShardedSampler.sample, from hidden (R, D): greedy rows by themselves are compared in the
        model's dtype. -> (R,) int64."""
        head = self.model.head if draws is None else self.model.logits
        logits = head(hidden)  # (R, V)
        first = self.model.shard.vocab.start
        return self.sampler.sample(logits, first, modes, draws, masks)

    def _choose(
        self,
        rows: tuple[StepRow, ...],
        hidden: torch.Tensor,
        callbacks: DriverCallbacks | None,
    ) -> torch.Tensor:
        """The driver's choice from the gathered logits, broadcast to all. -> (R,) int64."""
        logits = self._logits(hidden)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.ranks.device)
        if callbacks is not None and logits is not None:
            tokens.copy_(torch.tensor(callbacks.choose(list(rows), logits)))
        return broadcast(tokens, self.ranks)


def read_later(rows: list[int], tokens: torch.Tensor) -> Sampled:
    """Row -> its tokens, once it is asked for; on CUDA the copy to the host is on its way from now
    on. tokens: (R,) int64, one a row."""
    tokens = tokens.unsqueeze(1)  # (R, 1)
    if not tokens.is_cuda:
        return lambda: dict(zip(rows, tokens.tolist()))
    host, done = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(tokens, non_blocking=True)
    done.record()

    def read() -> dict[int, list[int]]:
        done.synchronize()
        return dict(zip(rows, host.tolist()))

    return read
