"""Chooses tokens from gathered logits, on the driver: for rows with a bias, penalties, min_tokens
or logprobs, and for those whose shortlist was too short.

The choice itself is that of sharded.py, with one shard that is the whole vocabulary: a row gets the
same token here and there. What is added here is what needs all logits of a row in one place. The
shortlist is longer, TOP_CANDIDATES, and where even that is too short it is the whole vocabulary.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from llama_tp.parallel.groups import Ranks
from llama_tp.sampling.filters import adjusted, allowed
from llama_tp.sampling.numerators import SoftmaxNumerators
from llama_tp.sampling.params import (
    NOT_FINITE,
    SHORTLIST_TOO_SHORT,
    Draw,
    SamplingMode,
    SamplingParams,
    drawn_mode,
    random53,
)
from llama_tp.sampling.sharded import ShardedSampler

# 1,024 of 128,256 logits take 1 ms a row, all of them 8
TOP_CANDIDATES = 1024


class GatheredRow(NamedTuple):
    """What is to be continued.

    `ids` are the prompt's, `n_prompt` of them, and then the output's. `seed` is the resolved one
    and `sample` says which of the request's n it is. The draw is keyed by (seed, sample, len(ids)).
    """

    params: SamplingParams
    ids: list[int]
    n_prompt: int
    seed: int
    sample: int


class GatheredSampler:
    """Chooses one token a row from all logits.

    Args:
        device: where the logits lie.
        n_vocab: ids below it may be chosen.
        numerators: how draws sum over the vocabulary; the shards' own, so that tokens are the same.
        eos_ids: the tokenizer's stop ids, which min_tokens holds off (with the request's own).
    """

    def __init__(
        self,
        device: torch.device,
        n_vocab: int,
        numerators: SoftmaxNumerators,
        eos_ids: tuple[int, ...],
    ):
        alone = Ranks(0, 1, device)
        self.n_vocab, self.eos_ids = n_vocab, eos_ids
        self.sampler = ShardedSampler(alone, n_vocab, numerators, TOP_CANDIDATES)

    def sample(
        self,
        rows: list[GatheredRow],
        logits: torch.Tensor,
        masks: list[torch.Tensor | None] | None = None,
    ) -> list[int]:
        """One token a row, NOT_FINITE where the logits are not.

        Args:
            logits: (R, V) fp32, unscaled; not changed.
            masks: for each row which tokens may come, (words,) int32 (filters.allowed), or None.
        """
        logits = logits[:, : self.n_vocab]
        # before anything is forbidden, which may hide NaN; true for minus infinity, false for NaN
        finite = logits.amax(dim=-1) < torch.inf
        by_mode: dict[SamplingMode, list[int]] = {}
        for i, row in enumerate(rows):
            by_mode.setdefault(drawn_mode(row.params), []).append(i)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for mode, at in by_mode.items():
            some = [rows[i] for i in at]
            mine = self._adjusted(at, some, logits, masks)
            if mode == SamplingMode.GREEDY:
                chosen = self.sampler.sample(mine, 0, frozenset((mode,)), None)
            else:
                draws = torch.tensor(
                    [
                        Draw.of(row.params, random53(row.seed, row.sample, len(row.ids)))
                        for row in some
                    ],
                    device=logits.device,
                )
                chosen = self._draw(mine, mode, draws)
            tokens[at] = chosen
        return torch.where(finite, tokens, NOT_FINITE).tolist()

    def _adjusted(
        self,
        at: list[int],
        rows: list[GatheredRow],
        logits: torch.Tensor,
        masks: list[torch.Tensor | None] | None,
    ) -> torch.Tensor:
        """The rows `at` of the logits after bias, penalties and masks: (R, V), without a copy where
        nothing changes."""
        changed, out = len(at) < len(logits), []
        for i, row in zip(at, rows):
            raw = logits[i]  # (V,)
            mine = adjusted(raw, row.params, row.ids, row.n_prompt, self.eos_ids)
            if masks is not None and (mask := masks[i]) is not None:
                mine = mine.masked_fill(~allowed(mask.to(mine.device), 0, len(mine)), -torch.inf)
            changed |= mine is not raw
            out.append(mine)
        return torch.stack(out) if changed else logits

    def _draw(self, logits: torch.Tensor, mode: SamplingMode, draws: torch.Tensor) -> torch.Tensor:
        """logits: (R, V) fp32; draws: (R, 5) -> (R,) int64, never SHORTLIST_TOO_SHORT."""
        modes = frozenset((mode,))
        tokens = self.sampler.sample(logits, 0, modes, draws)
        short = (tokens == SHORTLIST_TOO_SHORT).nonzero()[:, 0]
        if len(short):
            # one more than there are: the padding says that nothing lies beyond
            of_all = replace(self.sampler, shortlist=logits.shape[1] + 1)
            tokens[short] = of_all.sample(logits[short], 0, modes, draws[short])
        return tokens
