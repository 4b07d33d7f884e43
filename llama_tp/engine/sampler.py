"""Logits to token ids, on the driver: one row, one request, one choice for all ranks.

Rows never see each other: a row's penalties, filters and draw depend on its own logits and its own request, so that
company in a batch cannot change a token. Draws are keyed by (seed, sample index, position) instead of taken from a
generator, so neither can the order in which rows were computed.

Order of operations, as vLLM and transformers have it: logit_bias, repetition, presence and frequency penalties,
min_tokens (stop ids forbidden), temperature, top_k, top_p, min_p. Logprobs are those of the raw logits, as Meta's.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from llama_tp.engine.request import SamplingParams, Sequence

TOP_CANDIDATES = 1024           # sorted first when only top_p or min_p filter; a full sort follows if they do not suffice


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probability of one token and of the most likely alternatives, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """One row's outcome: a token, or None when its logits are not finite."""

    token: int | None
    logprobs: TokenLogprobs | None


def choose(rows: list[Sequence], logits: torch.Tensor, eos_ids: tuple[int, ...]) -> list[Choice]:
    """Samples one token a row.

    Args:
        rows: what is to be continued; a draw's position is the length of its ids.
        logits: (R, V) fp32, unscaled; not changed.
        eos_ids: the tokenizer's stop ids, which min_tokens holds off (with the request's own).
    """
    finite = (~(logits.isnan() | logits.isposinf()).any(dim=-1)).tolist()
    best = logits.argmax(dim=-1).tolist()
    return [_choose(row, logits[i], best[i], eos_ids) if finite[i] else Choice(None, None) for i, row in enumerate(rows)]


def _choose(row: Sequence, logits: torch.Tensor, best: int, eos_ids: tuple[int, ...]) -> Choice:
    params = row.params
    changed = adjusted(row, logits, eos_ids)
    if params.temperature == 0:
        token = best if changed is logits else int(changed.argmax())
    else:
        token = _draw(changed / params.temperature, params, uniform(row.seed, row.index, len(row.ids)))
    wanted = params.logprobs
    return Choice(token, None if wanted is None else score(logits.unsqueeze(0), [token], wanted)[0])


def score(logits: torch.Tensor, tokens: list[int], n_top: int) -> list[TokenLogprobs]:
    """Logprobs of given tokens and the n_top best. logits: (R, V) fp32, one row a token."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(min(n_top, logits.shape[-1]), dim=-1) if n_top else (logprobs[:, :0], logprobs[:, :0])
    return [TokenLogprobs(token, value, tuple(zip(map(int, row_ids), row_values)))
            for token, value, row_ids, row_values in zip(tokens, chosen, ids.tolist(), values.tolist())]


def adjusted(row: Sequence, logits: torch.Tensor, eos_ids: tuple[int, ...]) -> torch.Tensor:
    """The row's logits after bias, penalties and min_tokens: the same tensor when there are none, else a copy.
    logits: (V,) fp32."""
    params, output = row.params, row.output_ids
    held_off = params.stop_ids + (() if params.ignore_eos else eos_ids) if len(output) < params.min_tokens else ()
    repeats = params.repetition_penalty != 1
    counted = (params.presence_penalty or params.frequency_penalty) and output
    if not (params.logit_bias or repeats or counted or held_off):
        return logits
    logits = logits.clone()
    device = logits.device
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
    if repeats:                                                     # CTRL (arXiv 1909.05858): prompt and output alike
        seen = torch.tensor(sorted(set(row.ids)), device=device)
        value = logits[seen]
        logits[seen] = torch.where(value > 0, value / params.repetition_penalty, value * params.repetition_penalty)
    if counted:                                                     # OpenAI's: output only
        ids, counts = torch.tensor(output, device=device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts.float()
    if held_off:
        logits[list(held_off)] = -math.inf
    return logits


def uniform(seed: int, index: int, position: int) -> float:
    """The draw in [0, 1) of one sample at one position: 53 bits of a hash, the same on every machine."""
    key = f"{seed}/{index}/{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / (1 << 53)


def _draw(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """The token at quantile u of what the filters leave of softmax(logits). logits: (V,) fp32."""
    if params.top_k or params.top_p < 1 or params.min_p > 0:
        probs, ids = filtered(torch.softmax(logits, dim=-1), params)
    else:
        probs, ids = torch.softmax(logits, dim=-1), None
    mass = probs.double().cumsum(0)
    at = min(int(torch.searchsorted(mass, u * mass[-1], right=True)), len(mass) - 1)
    return at if ids is None else int(ids[at])


def filtered(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k, top_p and min_p keep, most likely first, and their (unnormalised) probabilities.

    top_p keeps a token when the mass *before* it does not exceed p: the one that crosses p stays (Meta's rule), and
    its mass is a share of what top_k left.
    """
    k = min(params.top_k or TOP_CANDIDATES, len(probs))
    values, ids = probs.topk(k)
    if not params.top_k and k < len(probs) and not _decided(values, params):
        values, ids = probs.sort(descending=True, stable=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.top_p < 1:
        mass = values.double().cumsum(0)
        whole = mass[-1] if params.top_k else probs.double().sum()
        keep &= (mass - values) <= params.top_p * whole
    if params.min_p > 0:
        keep &= values >= params.min_p * values[0]
    return values[keep], ids[keep]


def _decided(values: torch.Tensor, params: SamplingParams) -> bool:
    """Whether the best candidates alone show where the filters cut."""
    by_mass = params.top_p < 1 and float(values.double().sum()) > params.top_p
    by_ratio = params.min_p > 0 and float(values[-1]) < params.min_p * float(values[0])
    return by_mass or by_ratio
