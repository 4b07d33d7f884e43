"""Tokens and their log-probabilities as OpenAI shows them: a list of objects (chat), or parallel
arrays (completions).

A token is shown as its text; where its bytes are no text by themselves, as `bytes:\\xe2\\x82`, so
that no two tokens look the same; a special token, which has no text, by its name.
"""

import codecs
import math
from collections.abc import Iterable
from typing import Any

from llama_tp.engine.delta import TokenLogprobs
from llama_tp.protocol.order import ServedModel

LEAST = -9999.0  # stands for minus infinity, which JSON does not have


def token_text(model: ServedModel, token_id: int) -> str:
    """How one token is shown; different for every id."""
    data = model.tokenizer.token_bytes(token_id)
    if not data:
        return model.special_names.get(token_id, f"<|{token_id}|>")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data)


def finite(logprob: float) -> float:
    """`logprob` as JSON can hold it."""
    return logprob if math.isfinite(logprob) else LEAST


def chat_logprobs(model: ServedModel, scores: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """{"content": [{"token", "logprob", "bytes", "top_logprobs"}, ...], "refusal": None}."""
    return {
        "content": [
            _entry(model, one.token, one.logprob)
            | {"top_logprobs": [_entry(model, *each) for each in one.top]}
            for one in scores
        ],
        "refusal": None,
    }


def _entry(model: ServedModel, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(model, token_id),
        "logprob": finite(logprob),
        "bytes": list(model.tokenizer.token_bytes(token_id)),
    }


class Arrays:
    """The four arrays of one completion as they grow. `text_offset` counts characters of the text,
    prompt included if echoed: a token that ends a character begun by another stands where that
    character begins.

    Args:
        begins_at: offset of the first token: the length of an echoed prompt that is not scored.
    """

    def __init__(self, model: ServedModel, begins_at: int = 0):
        self.model, self._offset = model, begins_at
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, scores: Iterable[TokenLogprobs | None], first_id: int) -> dict[str, Any]:
        """The arrays' next piece. `first_id` is the token of an entry that is None: a prompt's
        first, which nothing predicts."""
        out: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for one in scores:
            token_id = first_id if one is None else one.token
            text = token_text(self.model, token_id)
            out["tokens"].append(text)
            out["text_offset"].append(self._offset)
            out["token_logprobs"].append(None if one is None else finite(one.logprob))
            out["top_logprobs"].append(None if one is None else self._top(one, text))
            self._offset += len(self._utf8.decode(self.model.tokenizer.token_bytes(token_id)))
        return out

    def _top(self, one: TokenLogprobs, text: str) -> dict[str, float]:
        """The likeliest and the token itself, whose number is the very float of
        `token_logprobs`."""
        return {
            token_text(self.model, token_id): finite(logprob) for token_id, logprob in one.top
        } | {text: finite(one.logprob)}
