"""The rules that choose a token, each written once: bias and penalties on logits, top_k, top_p and
min_p on probabilities, and the draw from what they leave.

`sharded.py` applies them to the best few tokens of every shard of the vocabulary, `gathered.py` to
all logits on the driver. Order, as in vLLM and transformers: logit_bias, repetition, presence and
frequency penalties, min_tokens (stop ids forbidden), temperature, top_k, top_p, min_p.

Rows never see each other, so company in a batch cannot change a token. Tensor letters: R rows,
V tokens of the vocabulary (or of a shard), S tokens of a shortlist.
"""

import math
from typing import NamedTuple

import torch

from llama_tp.sampling.numerators import CHUNK, SoftmaxNumerators
from llama_tp.sampling.params import SamplingParams

# ------------------------------------------------------------------------------------------- logits


def adjusted(
    logits: torch.Tensor,
    params: SamplingParams,
    ids: list[int],
    n_prompt: int,
    eos_ids: tuple[int, ...],
) -> torch.Tensor:
    """A row's logits after bias, penalties and min_tokens.

    Args:
        logits: (V,) fp32, not changed.
        ids: of the sequence, `n_prompt` of its prompt and then its output.
        eos_ids: the tokenizer's stop ids.

    Returns the same tensor if nothing changes it, else a new one.
    """
    output = ids[n_prompt:]
    held_off = (
        params.stop_ids + (() if params.ignore_eos else eos_ids)
        if len(output) < params.min_tokens
        else ()
    )
    repeats = params.repetition_penalty != 1
    counted = (params.presence_penalty or params.frequency_penalty) and output
    if not (params.logit_bias or repeats or counted or held_off):
        return logits
    logits = logits.clone()
    device = logits.device
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias), device=device)
        logits[biased] += torch.tensor(
            list(params.logit_bias.values()), dtype=torch.float32, device=device
        )
    if repeats:  # CTRL (arXiv 1909.05858): prompt and output alike
        seen = torch.tensor(sorted(set(ids)), device=device)
        value = logits[seen]
        logits[seen] = torch.where(
            value > 0, value / params.repetition_penalty, value * params.repetition_penalty
        )
    if counted:  # OpenAI's: output only
        written, counts = torch.tensor(output, device=device).unique(return_counts=True)
        logits[written] -= params.presence_penalty + params.frequency_penalty * counts.float()
    if held_off:
        logits[list(held_off)] = -math.inf
    return logits


def allowed(masks: torch.Tensor, first: int, n: int) -> torch.Tensor:
    """Bits to bools: whether tokens first .. first + n - 1 may come.

    masks: (..., words) int32. Token i is bit i % 32 of word i // 32; tokens beyond the words may
    not come. Returns (..., n) bool.
    """
    ids = torch.arange(first, first + n, device=masks.device)
    known = ids < 32 * masks.shape[-1]
    words = masks[..., torch.where(known, ids >> 5, 0)]  # (..., n)
    return ((words >> (ids & 31).int()) & 1).bool() & known


# ---------------------------------------------------------------------------------------- shortlist


def likeliest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last dimension and their places, best first.

    Of equal values (bf16 logits often are) the lower place comes first, so that the cut does not
    depend on how the vocabulary is sharded. values: (..., V) fp32, k <= V. Returns (..., k) fp32
    and int64.

    A second topk finds the lowest places of the value at the cut: 15 ms for 64 rows of 128,256,
    where sorting by keys of 64 bits took 120.
    """
    if k == values.shape[-1]:
        return values.sort(dim=-1, descending=True, stable=True)
    top, at = values.topk(k, dim=-1)  # of equal ones any
    cut = top[..., -1:]
    ids = torch.arange(values.shape[-1], device=values.device, dtype=torch.float32)
    # (..., k) at the cut, lowest first
    lowest = torch.where(values == cut, -ids, -math.inf).topk(k, dim=-1).indices
    above = top > cut
    fill = torch.arange(k, device=values.device) - above.sum(-1, keepdim=True)
    at = torch.where(above, at, lowest.gather(-1, fill.clamp(min=0))).sort(dim=-1).values
    top, order = values.gather(-1, at).sort(dim=-1, descending=True, stable=True)
    return top, at.gather(-1, order)


class DrawTensors(NamedTuple):
    """The fields of params.Draw as numbers, (R, 1) each: top_k int64, the others fp64."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    u: torch.Tensor


def unpacked(draws: torch.Tensor) -> DrawTensors:
    """draws: (R, 5) int64, a params.Draw a row."""
    temperature, top_k, top_p, min_p, u = draws.unsqueeze(-1).unbind(1)
    return DrawTensors(
        temperature.view(torch.float64),
        top_k,
        top_p.view(torch.float64),
        min_p.view(torch.float64),
        u.double() * 2.0**-53,
    )


def without_filters(draws: torch.Tensor) -> torch.Tensor:
    """Which rows draw from the whole distribution, (R,) bool; params.drawn_mode on the device."""
    _, top_k, top_p, min_p, _ = unpacked(draws)  # (R, 1) each
    return ((top_k == 0) & (top_p >= 1) & (min_p == 0))[:, 0]


def filter_probs(probs: torch.Tensor, draws: DrawTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies top_k, top_p and min_p to a shortlist.

    top_p keeps a token when the mass *before* it does not exceed p: the one that crosses p stays
    (Meta's rule), and its mass is a share of what top_k left.

    Args:
        probs: (R, S) fp64, best first: shares of the row's whole mass. A last one of 0 says that no
            token beyond the shortlist has any.
        draws: whose top_k, top_p and min_p are off at 0, 1 and 0.

    Returns the probabilities that stay, (R, S), the others 0; and (R, 1) bool, false where the
    shortlist is too short to show where the filters cut.
    """
    S, (_, top_k, top_p, min_p, _) = probs.shape[-1], draws
    by_mass = (top_p < 1) & (probs.cumsum(-1)[:, -1:] > top_p)
    by_ratio = (min_p > 0) & (probs[:, -1:] < min_p * probs[:, :1])
    decided = torch.where(top_k > 0, top_k <= S, by_mass | by_ratio) | (probs[:, -1:] == 0)
    at = torch.arange(S, device=probs.device)
    probs = torch.where((top_k > 0) & (at >= top_k), 0, probs)
    reached = probs.cumsum(-1)
    before = reached - probs
    kept = (top_p >= 1) | (before <= top_p * torch.where(top_k > 0, reached[:, -1:], 1))
    return torch.where(kept & (probs >= min_p * probs[:, :1]), probs, 0), decided


# -------------------------------------------------------------------------------------------- draws


def quantile(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Where the cumulated weights pass the part u of their sum, among the first places, which hold
    all that is above 0. weights: (R, S) fp64; u: (R, 1) fp64 -> (R, 1) int64."""
    reached = weights.cumsum(-1)
    place = (reached <= u * reached[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(place, (weights > 0).sum(-1, keepdim=True) - 1).clamp(min=0)


def place_in_chunks(
    logits: torch.Tensor,
    chunks: torch.Tensor,
    rest: torch.Tensor,
    temperature: torch.Tensor,
    best: torch.Tensor,
    numerators: SoftmaxNumerators,
) -> torch.Tensor:
    """Where in each row the cumulated numerators pass `rest`.

    Args:
        logits: (R, V) fp32. chunks: (R, C) int64, their chunk sums.
        rest: (R, 1) int64. temperature, best: (R, 1) fp32.

    Returns (R, 1) int64.
    """
    n = logits.shape[1]
    reached = chunks.cumsum(-1)
    chunk = (reached <= rest).sum(-1, keepdim=True).clamp(max=chunks.shape[1] - 1)  # (R, 1)
    rest = rest - (reached.gather(1, chunk) - chunks.gather(1, chunk))
    ids = chunk * CHUNK + torch.arange(CHUNK, device=logits.device)  # (R, CHUNK)
    some = logits.gather(1, ids.clamp(max=n - 1)).masked_fill(ids >= n, -math.inf)
    each = numerators.softmax_numerators(some, temperature, best)
    within = (each.cumsum(-1) <= rest).sum(-1, keepdim=True)
    return (chunk * CHUNK + within).clamp(max=n - 1)
