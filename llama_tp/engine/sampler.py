"""Logits to token ids, on the driver: one row, one request, one choice for all ranks. `choose` has
whole rows of logits before it, `pick` the likeliest few of each vocabulary shard, which usually
decide.

Rows never see each other: a row's penalties, filters and draw depend on its own logits and its own
request, so that company in a batch cannot change a token. Draws are keyed by (seed, sample index,
position) instead of taken from a generator, so neither can the order in which rows were computed.

Order of operations, as vLLM and transformers have it: logit_bias, repetition, presence and
frequency penalties, min_tokens (stop ids forbidden), temperature, top_k, top_p, min_p. Logprobs are
those of the raw logits, as Meta's, over all rows of the checkpoint's embedding, as in transformers
and vLLM. Rows that the tokenizer has no id for are never chosen nor told.
"""

import math
from dataclasses import dataclass

import torch

from llama_tp.engine.delta import TokenLogprobs
from llama_tp.engine.request import SamplingParams, Sequence, random53
from llama_tp.engine.step import NOT_FINITE, UNDECIDED
from llama_tp.sampling.numerators import CHUNK, SoftmaxNumerators

SHORTLIST = 64  # likeliest tokens of each vocabulary shard that travel when filters are on
# sorted first when only top_p or min_p filter; a full sort follows if they do not suffice
TOP_CANDIDATES = 1024


@dataclass(frozen=True)
class Choice:
    """One row's outcome: a token, or None when its logits are not finite."""

    token: int | None
    logprobs: TokenLogprobs | None


def choose(
    rows: list[Sequence],
    logits: torch.Tensor,
    eos_ids: tuple[int, ...],
    masks: list[torch.Tensor | None] | None = None,
    n_vocab: int | None = None,
) -> list[Choice]:
    """Samples one token a row.

    Args:
        rows: what is to be continued; a draw's position is the length of its ids.
        logits: (R, V) fp32, unscaled; not changed.
        eos_ids: the tokenizer's stop ids, which min_tokens holds off (with the request's own).
        masks: for each row which tokens may come, (words,) int32 bits (see `allowed`), or None.
        n_vocab: ids below it may come; unless given, all.
    """
    # NaN counts as highest
    highest, best = (each.tolist() for each in logits[:, :n_vocab].max(dim=-1))
    finite = [value < math.inf for value in highest]  # false for NaN too
    return [
        _choose(row, logits[i], best[i], eos_ids, masks and masks[i], n_vocab)
        if finite[i]
        else Choice(None, None)
        for i, row in enumerate(rows)
    ]


def _choose(
    row: Sequence,
    raw: torch.Tensor,
    best: int,
    eos_ids: tuple[int, ...],
    mask: torch.Tensor | None,
    n_vocab: int | None,
) -> Choice:
    params, logits = row.params, raw[:n_vocab]
    changed = adjusted(row, logits, eos_ids)
    if mask is not None:
        changed = changed.masked_fill(~allowed(mask, 0, len(logits)), -math.inf)
    if params.temperature == 0:
        token = best if changed is logits else int(changed.argmax())
    else:
        token = _draw(
            changed / params.temperature, params, uniform(row.seed, row.index, len(row.ids))
        )
    wanted = params.logprobs
    return Choice(
        token, None if wanted is None else score(raw.unsqueeze(0), [token], wanted, n_vocab)[0]
    )


def pick(
    lists: torch.Tensor, best: torch.Tensor, draws: torch.Tensor, numerators: SoftmaxNumerators
) -> torch.Tensor:
    """Samples one token a row from the likeliest of each vocabulary shard; the same token as from
    all logits. Sums are of integers, hence the same however many shards; no value comes to the
    host, so that a CUDA graph can hold it.

    Args:
        lists: (tp, R, 2 SHORTLIST + 1) int64: logits (bits of fp32, best first), their ids, and the
            shard's sum of weights.
        best: (R, 1) fp32, the highest logit of all.
        draws: (R, 5) int64, a step.Draw each.
        numerators: this machine's way to compute them.

    -> (R,) int64: token ids; NOT_FINITE where logits are not, UNDECIDED where the shortlist does
    not show where the filters cut.
    """
    # (tp, R, SHORTLIST) twice, (tp, R, 1)
    values, ids, mass = lists.split((SHORTLIST, SHORTLIST, 1), dim=-1)
    whole = mass.sum(dim=0).double()  # (R, 1)
    # (R, tp * SHORTLIST) each
    values, ids = (each.transpose(0, 1).flatten(1) for each in (values, ids))
    values, order = values.int().view(torch.float32).sort(dim=-1, descending=True, stable=True)
    values, ids = values[:, :SHORTLIST].contiguous(), ids.gather(1, order)[:, :SHORTLIST]
    temperature, top_k, top_p, min_p, u = unpacked(draws)  # (R, 1) each
    probs = (
        numerators.softmax_numerators(values, temperature.float(), best).double() / whole
    )  # (R, SHORTLIST)
    at = torch.arange(SHORTLIST, device=lists.device)
    by_mass = (top_p < 1) & (probs.cumsum(-1)[:, -1:] > top_p)
    by_ratio = (min_p > 0) & (probs[:, -1:] < min_p * probs[:, :1])
    decided = torch.where(top_k > 0, top_k <= SHORTLIST, by_mass | by_ratio | (probs[:, -1:] == 0))
    probs = torch.where((top_k > 0) & (at >= top_k), 0, probs)
    before = probs.cumsum(-1) - probs
    kept = (top_p >= 1) | (before <= top_p * torch.where(top_k > 0, probs.cumsum(-1)[:, -1:], 1))
    probs = torch.where(kept & (probs >= min_p * probs[:, :1]), probs, 0)
    reached = probs.cumsum(-1)
    place = (reached <= u * reached[:, -1:]).sum(-1, keepdim=True)  # (R, 1), the quantile u
    tokens = ids.gather(1, torch.minimum(place, (probs > 0).sum(-1, keepdim=True) - 1).clamp(min=0))
    return torch.where(best.isfinite(), torch.where(decided, tokens, UNDECIDED), NOT_FINITE)[:, 0]


def place_in(
    logits: torch.Tensor,
    chunks: torch.Tensor,
    rest: torch.Tensor,
    temperature: torch.Tensor,
    best: torch.Tensor,
    numerators: SoftmaxNumerators,
) -> torch.Tensor:
    """Where in each row the cumulated numerators pass `rest`. logits: (R, V) fp32; chunks: (R, C)
    int64, their chunk sums;
    rest: (R, 1) int64; temperature, best: (R, 1) -> (R, 1) int64."""
    n, size = logits.shape[1], CHUNK
    reached = chunks.cumsum(-1)
    chunk = (reached <= rest).sum(-1, keepdim=True).clamp(max=chunks.shape[1] - 1)  # (R, 1)
    rest = rest - (reached.gather(1, chunk) - chunks.gather(1, chunk))
    ids = chunk * size + torch.arange(size, device=logits.device)  # (R, size)
    some = logits.gather(1, ids.clamp(max=n - 1)).masked_fill(ids >= n, -math.inf)
    each = numerators.softmax_numerators(some, temperature, best)
    within = (each.cumsum(-1) <= rest).sum(-1, keepdim=True)
    return (chunk * size + within).clamp(max=n - 1)


def unpacked(draws: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of step.Draw as numbers, (R, 1) each. draws: (R, 5) int64."""
    temperature, top_k, top_p, min_p, u = draws.unsqueeze(-1).unbind(1)
    return (
        temperature.view(torch.float64),
        top_k,
        top_p.view(torch.float64),
        min_p.view(torch.float64),
        u.double() * 2.0**-53,
    )


def likeliest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last dimension and where they are, best first; of equal ones (bf16
    logits often are) the lower id is first, so that the cut does not depend on how the vocabulary
    is sharded. values: (..., V) fp32.

    A second topk finds the lowest ids of the value at the cut: 15 ms for 64 rows of 128,256, where
    sorting by keys of 64 bits took 120."""
    top, at = values.topk(k, dim=-1)  # of equal ones any
    cut, ids = (
        top[..., -1:],
        torch.arange(values.shape[-1], device=values.device, dtype=torch.float32),
    )
    # (..., k) at the cut, lowest first
    lowest = torch.where(values == cut, -ids, -math.inf).topk(k, dim=-1).indices
    above = top > cut
    fill = torch.arange(k, device=values.device) - above.sum(-1, keepdim=True)
    at = torch.where(above, at, lowest.gather(-1, fill.clamp(min=0))).sort(dim=-1).values
    top, order = values.gather(-1, at).sort(dim=-1, descending=True, stable=True)
    return top, at.gather(-1, order)


def _quantile(probs: torch.Tensor, u: float) -> int:
    """Where the cumulated probabilities pass the part u of their sum."""
    mass = probs.double().cumsum(0)
    return min(int(torch.searchsorted(mass, u * mass[-1], right=True)), len(mass) - 1)


def score(
    logits: torch.Tensor, tokens: list[int], n_top: int, n_vocab: int | None = None
) -> list[TokenLogprobs]:
    """Logprobs of given tokens and of the n_top best ids below `n_vocab`. logits: (R, V) fp32, one
    row a token."""
    logprobs = torch.log_softmax(logits, dim=-1)[:, :n_vocab]
    chosen = (
        logprobs.gather(
            1, torch.tensor(tokens, dtype=torch.int64, device=logits.device).unsqueeze(1)
        )
        .squeeze(1)
        .tolist()
    )
    values, ids = (
        logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1)
        if n_top
        else (logprobs[:, :0], logprobs[:, :0])
    )
    return [
        TokenLogprobs(token, value, tuple(zip(map(int, row_ids), row_values, strict=True)))
        for token, value, row_ids, row_values in zip(
            tokens, chosen, ids.tolist(), values.tolist(), strict=True
        )
    ]


def adjusted(row: Sequence, logits: torch.Tensor, eos_ids: tuple[int, ...]) -> torch.Tensor:
    """The row's logits after bias, penalties and min_tokens: the same tensor when there are none,
    else a copy.
    logits: (V,) fp32."""
    params, output = row.params, row.output_ids
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
        ids = torch.tensor(list(params.logit_bias), device=device)
        logits[ids] += torch.tensor(
            list(params.logit_bias.values()), dtype=torch.float32, device=device
        )
    if repeats:  # CTRL (arXiv 1909.05858): prompt and output alike
        seen = torch.tensor(sorted(set(row.ids)), device=device)
        value = logits[seen]
        logits[seen] = torch.where(
            value > 0, value / params.repetition_penalty, value * params.repetition_penalty
        )
    if counted:  # OpenAI's: output only
        ids, counts = torch.tensor(output, device=device).unique(return_counts=True)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * counts.float()
    if held_off:
        logits[list(held_off)] = -math.inf
    return logits


def allowed(masks: torch.Tensor, first: int, n: int) -> torch.Tensor:
    """Bits to bools: whether tokens first .. first + n - 1 may come; token i is bit i % 32 of word
    i // 32, those beyond the words may not. (..., words) int32 -> (..., n)."""
    ids = torch.arange(first, first + n, device=masks.device)
    known = ids < 32 * masks.shape[-1]
    words = masks[..., torch.where(known, ids >> 5, 0)]  # (..., n)
    return ((words >> (ids & 31).int()) & 1).bool() & known


def uniform(seed: int, index: int, position: int) -> float:
    """The draw in [0, 1) of one sample at one position."""
    return random53(seed, index, position) * 2.0**-53


def _draw(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """The token at quantile u of what the filters leave of softmax(logits). logits: (V,) fp32."""
    if params.top_k or params.top_p < 1 or params.min_p > 0:
        probs, ids = filtered(torch.softmax(logits, dim=-1), params)
    else:
        probs, ids = torch.softmax(logits, dim=-1), None
    at = _quantile(probs, u)
    return at if ids is None else int(ids[at])


def filtered(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top_k, top_p and min_p keep, most likely first, and their (unnormalised)
    probabilities.

    top_p keeps a token when the mass *before* it does not exceed p: the one that crosses p stays
    (Meta's rule), and its mass is a share of what top_k left.
    """
    k = min(params.top_k or TOP_CANDIDATES, len(probs))
    values, ids = likeliest(probs, k)
    if not params.top_k and k < len(probs) and not _decided(values, params):
        values, ids = probs.sort(descending=True, stable=True)
    keep = _keep(values, params, values.double().sum() if params.top_k else probs.double().sum())
    return values[keep], ids[keep]


def _keep(
    values: torch.Tensor, params: SamplingParams, whole: torch.Tensor | float
) -> torch.Tensor:
    """Which of the probabilities, largest first, top_p (of the mass `whole`) and min_p keep."""
    keep = torch.ones_like(values, dtype=torch.bool)
    if params.top_p < 1:
        keep &= (values.double().cumsum(0) - values) <= params.top_p * whole
    if params.min_p > 0:
        keep &= values >= params.min_p * values[0]
    return keep


def _decided(values: torch.Tensor, params: SamplingParams) -> bool:
    """Whether the best candidates alone show where the filters cut."""
    by_mass = params.top_p < 1 and float(values.double().sum()) > params.top_p
    by_ratio = params.min_p > 0 and float(values[-1]) < params.min_p * float(values[0])
    return by_mass or by_ratio
