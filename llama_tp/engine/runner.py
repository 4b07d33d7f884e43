"""Runs a step on this rank: plain ints in, the model's pass over its shard, the driver's choice back to all.

The same code on every rank; only `choose` and `score` are the driver's. What a row sampled last is kept here, on
every rank, so that a decode row travels without its token.
"""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_tp.engine.sampler import SHORTLIST, UNDECIDED, likeliest
from llama_tp.engine.step import GATHERED, GREEDY, Step, StepRow
from llama_tp.model.attention import Span
from llama_tp.model.kv_cache import KVCache, Slots
from llama_tp.model.transformer import Batch, Transformer
from llama_tp.parallel.collectives import broadcast, gather_stack, gather_to_driver

SCORE_ROWS = 64                 # prompt positions whose logits exist at once when prompt logprobs are asked for

Choose = Callable[[list[StepRow], torch.Tensor], list[int]]
Take = Callable[[list[StepRow], list[int]], None]
Way = Callable[[list[StepRow], torch.Tensor, "Judge | None"], torch.Tensor]
Score = Callable[[StepRow, int, torch.Tensor], None]


@dataclass(frozen=True)
class Judge:
    """The driver's part of a step.

    choose: the rows that sample and their logits (R, V) fp32 -> one token id each.
    take: greedy rows and their token ids, on which the ranks have agreed; -1 where logits are not finite.
    pick: rows and the shortlists of all shards (tp, R, 2 SHORTLIST + 1) -> one token id each; -1 as above, UNDECIDED where
        the shortlist does not suffice.
    score: a row, the first position scored and the logits (n, V) of n consecutive prompt positions.
    """

    choose: Choose
    take: Take
    pick: Choose
    score: Score


class Runner:
    """One rank's model, cache and per-row memory.

    Args:
        max_rows: the most sequences at once; rows are numbered below it.
        n_vocab: ids that may be sampled; the head's rows beyond are padding or have no text.
    """

    def __init__(self, model: Transformer, cache: KVCache, max_rows: int, n_vocab: int):
        self.model, self.cache, self.n_vocab, self.ranks = model, cache, n_vocab, model.ranks
        self.tables: list[list[int]] = [[] for _ in range(max_rows)]
        self.planning_s = 0.0           # of the last step: from ints to tensors
        self.last = torch.zeros(max_rows, dtype=torch.int64, device=model.ranks.device)

    @torch.inference_mode()
    def run(self, step: Step, judge: Judge | None) -> None:
        """One step. `judge` is given on the driver and None elsewhere."""
        started = time.perf_counter()
        for row in step.rows:
            self._own(row)
        batch, ends = self._batch(step)
        self.planning_s = time.perf_counter() - started
        hidden = self.model(batch, self.cache)                      # (T, D)
        for row, end in zip(step.rows, ends):
            if row.prompt_logits:
                self._score(row, hidden[end - row.n:end], judge)
        ways: dict[Way, list[tuple[StepRow, int]]] = {self._agree: [], self._shortlist: [], self._sample: []}
        for row, end in zip(step.rows, ends):
            if row.sample:
                way = {GATHERED: self._sample, GREEDY: self._agree}.get(row.on_shards, self._shortlist)
                ways[way].append((row, end - 1))
        for way, some in ways.items():
            if some:
                rows, at = zip(*some)
                self._remember(rows, way(rows, hidden[list(at)], judge))

    def _own(self, row: StepRow) -> None:
        """Extends the row's block table; blocks that are not prefix hits are cleared for their new owner."""
        table = self.tables[row.row]
        del table[row.block_start:]
        table.extend(row.blocks)
        n_reused = row.start // self.cache.block_size if row.block_start == 0 else 0
        self.cache.clear(list(row.blocks[n_reused:]))

    def _batch(self, step: Step) -> tuple[Batch, list[int]]:
        """The step as tensors, and where each row's tokens end in it."""
        S, device = self.cache.block_size, self.ranks.device
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        spans, ends, decodes = [], [], []
        for row in step.rows:
            spans.append(Span(len(ids), row.start, row.n, self.tables[row.row]))
            if not row.ids:
                decodes.append((len(ids), row.row))
            ids += row.ids or [0]
            span = range(row.start, row.start + row.n)
            positions += span
            blocks += [self.tables[row.row][p // S] for p in span]
            ends.append(len(ids))
        padding = max(0, self.model.rows_floor - len(ids))
        ids, positions, blocks = ids + [0] * padding, positions + [0] * padding, blocks + [self.cache.trash] * padding
        flat = torch.tensor([ids, positions, blocks], device=device)                   # (3, T)
        if decodes:
            at, rows = torch.tensor(decodes, device=device).T
            flat[0, at] = self.last[rows]
        plan = self.model.kernels.plan(spans, self.model.config.n_heads // self.ranks.tp, self.cache, len(ids))
        return Batch(flat[0], flat[1], Slots(flat[2], flat[1] % S), plan), ends

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(R, D) -> (R, n_vocab) on the driver, None elsewhere."""
        shards = gather_to_driver(self.model.logits(hidden), self.ranks)
        return None if shards is None else torch.cat(shards, dim=-1)[:, :self.n_vocab]

    def _score(self, row: StepRow, hidden: torch.Tensor, judge: Judge | None) -> None:
        for at in range(0, row.n, SCORE_ROWS):
            logits = self._logits(hidden[at:at + SCORE_ROWS])
            if judge is not None:
                judge.score(row, row.start + at, logits)

    def _agree(self, rows: list[StepRow], hidden: torch.Tensor, judge: Judge | None) -> torch.Tensor:
        """The likeliest token of each row: every rank compares all ranks' best, so no logits travel and no choice.
        Of equal ones the lowest id wins, at any tp. -> (R,) int64, -1 where logits are not finite."""
        mine, first = self._without_padding(self.model.head(hidden))
        value, at = mine.max(dim=-1)                                                    # (R,) each; NaN counts as largest
        best = gather_stack(torch.stack([value.double(), (at + first).double()]), self.ranks)       # (tp, 2, R)
        value, who = best[:, 0].max(dim=0)
        tokens = best[:, 1].gather(0, who.unsqueeze(0))[0].long()
        tokens = torch.where(value.isfinite(), tokens, -1)
        if judge is not None:
            judge.take(rows, tokens.tolist())
        return tokens

    def _shortlist(self, rows: list[StepRow], hidden: torch.Tensor, judge: Judge | None) -> torch.Tensor:
        """Each shard's best few and its whole mass, at each row's temperature, are all that the driver needs to apply
        top_k, top_p and min_p, if these cut within the best few; else the row's logits are gathered after all. -> (R,)."""
        temperature = torch.tensor([struct.unpack(">f", row.on_shards.to_bytes(4, "big")) for row in rows], device=hidden.device)
        mine, first = self._without_padding(self.model.logits(hidden))
        scaled = mine / temperature                                                     # (R, V)
        values, at = likeliest(scaled, min(SHORTLIST, scaled.shape[1]))                 # (R, SHORTLIST) each, or fewer
        mass = (scaled - values[:, :1]).exp().sum(dim=-1, dtype=torch.float64)          # (R,), relative to the best
        mass = mass.masked_fill(values[:, 0] == -torch.inf, 0)                          # nothing but padding here
        values = F.pad(values.double(), (0, SHORTLIST - values.shape[1]), value=-torch.inf)
        ids = F.pad((at + first).double(), (0, SHORTLIST - at.shape[1]))
        lists = gather_stack(torch.cat([values, ids, mass.unsqueeze(1)], dim=1), self.ranks)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=hidden.device)
        if judge is not None:
            tokens.copy_(torch.tensor(judge.pick(rows, lists)))
        broadcast(tokens, self.ranks)
        open_ = (tokens == UNDECIDED).nonzero().flatten().tolist()
        if open_:
            tokens[open_] = self._sample([rows[i] for i in open_], hidden[open_], judge)
        return tokens

    def _without_padding(self, logits: torch.Tensor) -> tuple[torch.Tensor, int]:
        """This rank's logits (R, V) of ids that may be sampled, and the id of the first. A rank that holds nothing but
        padding offers one of minus infinity."""
        first = self.ranks.rank * logits.shape[1]
        n = self.n_vocab - first
        return (logits[:, :n], first) if n > 0 else (torch.full_like(logits[:, :1], -torch.inf), 0)

    def _remember(self, rows: list[StepRow], tokens: torch.Tensor) -> None:
        self.last[torch.tensor([row.row for row in rows], device=self.ranks.device)] = tokens

    def _sample(self, rows: list[StepRow], hidden: torch.Tensor, judge: Judge | None) -> torch.Tensor:
        """The driver's choice from the gathered logits, broadcast to all. -> (R,) int64."""
        logits = self._logits(hidden)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.ranks.device)
        if judge is not None:
            tokens.copy_(torch.tensor(judge.choose(rows, logits)))
        return broadcast(tokens, self.ranks)
