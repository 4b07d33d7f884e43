"""Chooses tokens where the logits lie: each rank holds its shard of the vocabulary, and no row of
logits is gathered.

Sums over the vocabulary are of integers (numerators.py), so the token is the same however many
shards there are. No value comes to the host, so that a CUDA graph can hold all of it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama_tp.parallel.collectives import broadcast, gather_stack
from llama_tp.parallel.groups import Ranks
from llama_tp.sampling.filters import (
    allowed,
    filter_probs,
    likeliest,
    place_in_chunks,
    quantile,
    unpacked,
    without_filters,
)
from llama_tp.sampling.numerators import SoftmaxNumerators
from llama_tp.sampling.params import NOT_FINITE, SHORTLIST_TOO_SHORT, SamplingMode

SHORTLIST = 64  # likeliest tokens of each shard that travel where there are filters
ALL_UNFILTERED = frozenset({SamplingMode.UNFILTERED})


@dataclass(frozen=True)
class ShardedSampler:
    """One rank's part in choosing tokens from sharded logits; every rank calls it alike.

    Args:
        ranks: who holds the other shards.
        n_vocab: ids below it may be chosen; rows of logits beyond have no text, or pad the shards.
        numerators: how draws sum over the vocabulary.
        shortlist: how many of each shard's likeliest tokens the filters see.
    """

    ranks: Ranks
    n_vocab: int
    numerators: SoftmaxNumerators
    shortlist: int = SHORTLIST

    def sample(
        self,
        logits: torch.Tensor,
        first: int,
        modes: frozenset[SamplingMode],
        draws: torch.Tensor | None,
        masks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One token a row.

        Args:
            logits: (R, V), this rank's; fp32, or the model's dtype where all rows are greedy.
            first: the id of this shard's first token.
            modes: those that occur among the rows; a greedy row among others has GREEDY_DRAW.
            draws: (R, 5) int64, a params.Draw a row; None where all rows are greedy.
            masks: (R, words) int32, which tokens may come (filters.allowed); None: all.

        Returns (R,) int64, the same on every rank: ids; NOT_FINITE where the logits are not, and
        SHORTLIST_TOO_SHORT where the shortlist does not show where the filters cut.
        """
        mine, first = self._choices(logits, first, masks)
        if draws is None:
            return self.greedy(mine, first)
        if modes == ALL_UNFILTERED:
            return self.unfiltered(mine, first, draws)
        tokens = self.top_k_top_p(mine, first, draws)
        if SamplingMode.UNFILTERED in modes:
            tokens = torch.where(
                without_filters(draws), self.unfiltered(mine, first, draws), tokens
            )
        return tokens

    def greedy(self, mine: torch.Tensor, first: int) -> torch.Tensor:
        """Every rank compares all ranks' best. Of equal ones the lowest id wins, at any tp.
        mine: (R, V) -> (R,) int64."""
        value, at = mine.max(dim=-1)  # (R,) each; NaN counts as largest
        # (tp, 2, R)
        best = gather_stack(torch.stack([value.double(), (at + first).double()]), self.ranks)
        value, who = best[:, 0].max(dim=0)
        tokens = best[:, 1].gather(0, who.unsqueeze(0))[0].long()
        return torch.where(value.isfinite(), tokens, NOT_FINITE)

    def unfiltered(self, mine: torch.Tensor, first: int, draws: torch.Tensor) -> torch.Tensor:
        """The token at quantile u of softmax(logits / temperature). The ranks tell each other the
        sums of their numerators, and the one whose shard holds the token the token.
        mine: (R, V) fp32; draws: (R, 5) -> (R,) int64."""
        each = unpacked(draws)
        temperature = each.temperature.float()  # (R, 1)
        # (R, 1); NaN if any is
        best = gather_stack(mine.amax(-1, keepdim=True), self.ranks).amax(0)
        chunks = self.numerators.chunk_sums(mine, temperature, best)  # (R, C)
        sums = gather_stack(chunks.sum(-1, keepdim=True), self.ranks)  # (tp, R, 1)
        total, rank = sums.sum(0), self.ranks.rank
        target = torch.minimum((each.u * total.double()).long(), total - 1)  # (R, 1)
        rest = target - (sums.cumsum(0) - sums)[rank]
        here = (rest >= 0) & (rest < sums[rank])
        tokens = place_in_chunks(mine, chunks, rest, temperature, best, self.numerators) + first
        tokens = gather_stack(torch.where(here, tokens, 0), self.ranks).sum(0)
        return torch.where(best.isfinite(), tokens, NOT_FINITE)[:, 0]

    def top_k_top_p(self, mine: torch.Tensor, first: int, draws: torch.Tensor) -> torch.Tensor:
        """A draw from what the filters leave of each shard's likeliest tokens. Rank 0's result is
        everyone's: exp may differ between unlike hosts.
        mine: (R, V) fp32; draws: (R, 5) -> (R,) int64."""
        S = self.shortlist
        temperature = unpacked(draws).temperature.float()
        values, at = likeliest(mine, min(S, mine.shape[1]))  # (R, S) each, or fewer
        # (R, 1); NaN if any is, which `likeliest` may leave out
        best = gather_stack(mine.amax(-1, keepdim=True), self.ranks).amax(0)
        mass = self.numerators.chunk_sums(mine, temperature, best).sum(-1, keepdim=True)  # (R, 1)
        values = F.pad(values, (0, S - values.shape[1]), value=-torch.inf).view(torch.int32).long()
        ids = F.pad(at + first, (0, S - at.shape[1]))
        # (tp, R, 2 S + 1)
        lists = gather_stack(torch.cat([values, ids, mass], dim=1), self.ranks)
        return broadcast(self._drawn(lists, best, draws), self.ranks)

    def _drawn(self, lists: torch.Tensor, best: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """lists: (tp, R, 2 S + 1) int64: of each shard the likeliest logits (bits of fp32, best
        first), their ids, and the sum of all its numerators. best: (R, 1) fp32, the highest logit
        of all. -> (R,) int64."""
        S = self.shortlist
        values, ids, mass = lists.split((S, S, 1), dim=-1)  # (tp, R, S) twice, (tp, R, 1)
        whole = mass.sum(dim=0).double()  # (R, 1)
        # (R, tp * S) each
        values, ids = (each.transpose(0, 1).flatten(1) for each in (values, ids))
        values, order = values.int().view(torch.float32).sort(dim=-1, descending=True, stable=True)
        values, ids = values[:, :S].contiguous(), ids.gather(1, order)[:, :S]
        each = unpacked(draws)
        numerators = self.numerators.softmax_numerators(values, each.temperature.float(), best)
        probs, decided = filter_probs(numerators.double() / whole, each)  # (R, S), (R, 1)
        tokens = ids.gather(1, quantile(probs, each.u))
        tokens = torch.where(decided, tokens, SHORTLIST_TOO_SHORT)
        return torch.where(best.isfinite(), tokens, NOT_FINITE)[:, 0]

    def _choices(
        self, logits: torch.Tensor, first: int, masks: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        """The logits (R, V) of this shard's ids that may be chosen, minus infinity where a mask
        forbids it, and the first id. A rank that holds nothing but padding offers one of minus
        infinity."""
        n = min(self.n_vocab - first, logits.shape[1])
        if n <= 0:
            return torch.full_like(logits[:, :1], -torch.inf), 0
        mine = logits[:, :n]
        if masks is not None:
            mine = mine.masked_fill(~allowed(masks, first, n), -torch.inf)
        return mine, first
