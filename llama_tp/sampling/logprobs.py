"""Logprobs of raw logits: before bias, penalties, temperature and filters, as Meta's. They are
normalised over all rows of the checkpoint's embedding, as in transformers and vLLM; rows without a
token id are never told."""

import torch

from llama_tp.sampling.params import TokenLogprobs


def score(
    logits: torch.Tensor, tokens: list[int], n_top: int, n_vocab: int | None = None
) -> list[TokenLogprobs]:
    """Logprobs of given tokens and of the `n_top` best ids below `n_vocab` (None: of all).
    logits: (R, V) fp32, one row a token."""
    logprobs = torch.log_softmax(logits, dim=-1)[:, :n_vocab]
    ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device).unsqueeze(1)  # (R, 1)
    chosen = logprobs.gather(1, ids).squeeze(1).tolist()
    top: list[tuple[tuple[int, float], ...]] = [()] * len(tokens)
    if n_top:
        best = logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1)
        top = [
            tuple(zip(row_ids, row_values, strict=True))
            for row_ids, row_values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return [TokenLogprobs(*each) for each in zip(tokens, chosen, top, strict=True)]
