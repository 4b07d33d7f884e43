"""Runs a step on this rank: plain ints in, the model's pass over its shard, the sampled ids kept on
every rank.

The same code on every rank; only `choose` and `score` are the driver's. What a row sampled last is
kept here, on every rank, so that a decode row travels without its token. Nothing here waits for the
device unless the driver has to see logits: the sampled ids are read when the driver asks for them,
which may be one step later.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_tp.backends.base import ForwardBatch, Span
from llama_tp.backends.kv_cache import KVCache, Slots, on_device
from llama_tp.engine.cuda_graph import DecodeGraphs, Record
from llama_tp.engine.sampler import SHORTLIST, allowed, likeliest, pick, place_in, unpacked
from llama_tp.engine.step import GATHERED, GREEDY, NOT_FINITE, WHOLE, Step, StepRow
from llama_tp.model.llama import Transformer
from llama_tp.parallel.collectives import broadcast, gather_stack, gather_to_driver
from llama_tp.sampling.numerators import SoftmaxNumerators, numerators_on

SCORE_ROWS = 64  # prompt positions whose logits exist at once when prompt logprobs are asked for

Choose = Callable[[list[StepRow], torch.Tensor], list[int]]
Score = Callable[[StepRow, int, torch.Tensor], None]
Sampled = Callable[[], dict[int, int]]


@dataclass(frozen=True)
class Judge:
    """The driver's part of a step.

    choose: the GATHERED rows that sample and their logits (R, V) fp32 -> one token id each, below
        `n_vocab`.
    score: a row, the first position scored and the logits (n, V) of n consecutive prompt positions.
    V is the checkpoint's whole vocabulary: rows of the head without a token id count in logprobs.
    """

    choose: Choose
    score: Score


class Runner:
    """One rank's model, cache and per-row memory.

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
        self.tables: list[list[int]] = [[] for _ in range(max_rows)]
        self.planning_s = 0.0  # of the last step: from ints to tensors
        # one more: padding's
        self.last = torch.zeros(max_rows + 1, dtype=torch.int64, device=model.ranks.device)
        self.graphs = record and DecodeGraphs(model, cache, self.last, self.on_shards, record)

    def capture(self) -> str | None:
        """Every rank, before the first step: captures what decodes will be replayed from. -> why
        not, on one rank."""
        return self.graphs and self.graphs.capture()

    def release(self) -> None:
        """Drops what was captured, which the process groups would wait for when they are taken
        down."""
        if self.graphs:
            self.graphs.release()

    @torch.inference_mode()
    def run(
        self, step: Step, judge: Judge | None, masks: Callable[[], torch.Tensor] | None = None
    ) -> Sampled:
        """One step. `judge` is given on the driver and None elsewhere; masks: gives, once the model
        has run, (masked rows, words) int32, which tokens may come (sampler.allowed), in the order
        of the rows. -> on the driver what gives row -> sampled id, or NOT_FINITE or UNDECIDED, when
        called, waiting for the device if need be."""
        started = time.perf_counter()
        for row in step.rows:
            if row.blocks:
                self._own(row)
        if self.graphs and (captured := self.graphs.find(step)):
            self.planning_s = time.perf_counter() - started
            tokens = self.graphs.run(step, captured)
            return later([row.row for row in step.rows], tokens) if judge else dict
        batch, ends = self._batch(step)
        self.planning_s = time.perf_counter() - started
        hidden = self.model(batch, self.cache)  # (T, D)
        for row, end in zip(step.rows, ends):
            if row.prompt_logits:
                self._score(row, hidden[end - row.n : end], judge)
        ways: dict[tuple[int, bool], list[tuple[StepRow, int]]] = {}
        for row, end in zip(step.rows, ends):
            if row.sample:
                ways.setdefault((row.way, row.masked), []).append((row, end - 1))
        words = masks() if any(masked for _, masked in ways) else None
        sampled, tokens = [], []
        for (way, masked), some in sorted(ways.items()):
            rows, at = zip(*some)
            sampled += [row.row for row in rows]
            mask = self._masks_of(rows, step, words) if masked else None
            tokens.append(self._sample(way, rows, hidden[self._tensor(at)], judge, mask))
        if not sampled:
            return dict
        everything = torch.cat(tokens)
        self.last[self._tensor(sampled)] = everything
        return later(sampled, everything) if judge else dict

    def _tensor(self, ints: list | tuple) -> torch.Tensor:
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
        shards = gather_to_driver(self.model.logits(hidden), self.ranks)
        return (
            None if shards is None else torch.cat(shards, dim=-1)[:, : self.model.config.vocab_size]
        )

    def _score(self, row: StepRow, hidden: torch.Tensor, judge: Judge | None) -> None:
        for at in range(0, row.n, SCORE_ROWS):
            logits = self._logits(hidden[at : at + SCORE_ROWS])
            if judge is not None:
                judge.score(row, row.start + at, logits)

    def _sample(
        self,
        way: int,
        rows: tuple[StepRow, ...],
        hidden: torch.Tensor,
        judge: Judge | None,
        masks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token for each row of one way. hidden: (R, D); masks: (R, words) or None -> (R,)
        int64."""
        if way == GATHERED:
            return self._choose(rows, hidden, judge)
        return self.on_shards(
            hidden,
            frozenset((way,)),
            None if way == GREEDY else self._tensor([row.draw for row in rows]),
            masks,
        )

    def _masks_of(self, rows: tuple[StepRow, ...], step: Step, masks: torch.Tensor) -> torch.Tensor:
        order = [row.row for row in step.rows if row.masked]
        return on_device(masks[[order.index(row.row) for row in rows]], self.ranks.device)

    def on_shards(
        self,
        hidden: torch.Tensor,
        ways: frozenset[int],
        draws: torch.Tensor | None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sampling without gathering logits. hidden: (R, D); ways: those that occur among the rows,
        a greedy row among others having a draw with top_k 1; draws: (R, 5), or None where all are
        greedy; masks: (R, words) -> (R,) int64."""
        if draws is None:
            return self._agree(hidden, masks)
        mine, first = self._choices(self.model.logits(hidden), masks)
        if ways == {WHOLE}:
            return self._whole(mine, first, draws)
        tokens = self._shortlist(mine, first, draws)
        if WHOLE in ways:
            _, top_k, top_p, min_p, _ = unpacked(draws)
            is_whole = ((top_k == 0) & (top_p >= 1) & (min_p == 0))[:, 0]
            tokens = torch.where(is_whole, self._whole(mine, first, draws), tokens)
        return tokens

    def _agree(self, hidden: torch.Tensor, masks: torch.Tensor | None) -> torch.Tensor:
        """The likeliest token of each row: every rank compares all ranks' best, so no logits travel
        and no choice.
        Of equal ones the lowest id wins, at any tp."""
        mine, first = self._choices(self.model.head(hidden), masks)
        value, at = mine.max(dim=-1)  # (R,) each; NaN counts as largest
        # (tp, 2, R)
        best = gather_stack(torch.stack([value.double(), (at + first).double()]), self.ranks)
        value, who = best[:, 0].max(dim=0)
        tokens = best[:, 1].gather(0, who.unsqueeze(0))[0].long()
        return torch.where(value.isfinite(), tokens, NOT_FINITE)

    def _whole(self, mine: torch.Tensor, first: int, draws: torch.Tensor) -> torch.Tensor:
        """The token at quantile u of softmax(logits / temperature): the ranks tell each other their
        shards' weights, exact integers, and the one whose shard holds it the token. mine: (R, V)
        fp32."""
        temperature, u = unpacked(draws)[0].float(), unpacked(draws)[4]
        # (R, 1); NaN if any is
        best = gather_stack(mine.amax(-1, keepdim=True), self.ranks).amax(0)
        chunks = self.numerators.chunk_sums(mine, temperature, best)  # (R, C)
        sums = gather_stack(chunks.sum(-1, keepdim=True), self.ranks)  # (tp, R, 1)
        total, rank = sums.sum(0), self.ranks.rank
        target = torch.minimum((u * total.double()).long(), total - 1)  # (R, 1)
        rest = target - (sums.cumsum(0) - sums)[rank]
        here = (rest >= 0) & (rest < sums[rank])
        tokens = place_in(mine, chunks, rest, temperature, best, self.numerators) + first
        tokens = gather_stack(torch.where(here, tokens, 0), self.ranks).sum(0)
        return torch.where(best.isfinite(), tokens, NOT_FINITE)[:, 0]

    def _shortlist(self, mine: torch.Tensor, first: int, draws: torch.Tensor) -> torch.Tensor:
        """Each shard's best few and its whole mass, at each row's temperature, are all it takes to
        apply top_k, top_p and min_p, if these cut within the best few. Rank 0's result is
        everyone's: on unlike hosts exp may differ."""
        temperature = unpacked(draws)[0].float()
        values, at = likeliest(mine, min(SHORTLIST, mine.shape[1]))  # (R, SHORTLIST) each, or fewer
        best = gather_stack(values[:, :1].contiguous(), self.ranks).amax(0)  # (R, 1); NaN if any is
        mass = self.numerators.chunk_sums(mine, temperature, best).sum(-1, keepdim=True)  # (R, 1)
        values = (
            F.pad(values, (0, SHORTLIST - values.shape[1]), value=-torch.inf)
            .view(torch.int32)
            .long()
        )
        ids = F.pad(at + first, (0, SHORTLIST - at.shape[1]))
        # (tp, R, 2 SHORTLIST + 1)
        lists = gather_stack(torch.cat([values, ids, mass], dim=1), self.ranks)
        return broadcast(pick(lists, best, draws, self.numerators), self.ranks)

    def _choices(
        self, logits: torch.Tensor, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        """This rank's logits (R, V) of ids that may be sampled, minus infinity where a mask forbids
        it, and the id of the first. A rank that holds nothing but padding offers one of minus
        infinity."""
        first = self.ranks.rank * logits.shape[1]
        n = min(self.n_vocab - first, logits.shape[1])
        if n <= 0:
            return torch.full_like(logits[:, :1], -torch.inf), 0
        mine = logits[:, :n]
        return (
            mine if masks is None else mine.masked_fill(~allowed(masks, first, n), -torch.inf)
        ), first

    def _choose(
        self, rows: tuple[StepRow, ...], hidden: torch.Tensor, judge: Judge | None
    ) -> torch.Tensor:
        """The driver's choice from the gathered logits, broadcast to all. -> (R,) int64."""
        logits = self._logits(hidden)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.ranks.device)
        if judge is not None:
            tokens.copy_(torch.tensor(judge.choose(list(rows), logits)))
        return broadcast(tokens, self.ranks)


def later(rows: list[int], tokens: torch.Tensor) -> Sampled:
    """Row -> token once it is asked for; on CUDA the copy to the host is on its way from now on."""
    if not tokens.is_cuda:
        return lambda: dict(zip(rows, tokens.tolist()))
    host, done = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(tokens, non_blocking=True)
    done.record()

    def read() -> dict[int, int]:
        done.synchronize()
        return dict(zip(rows, host.tolist()))

    return read
