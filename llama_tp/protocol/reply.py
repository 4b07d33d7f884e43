"""From what the engine's samples gain to OpenAI's replies. One producer, two presenters: `Chunks`
makes the chunks of a stream, which a stream sends as they are, and `Fold` folds them into the one
reply of a request that does not stream.

Knows no clock and no dice: `created` and ids come from the caller.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from llama_tp.engine.delta import Delta, TokenLogprobs
from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.logprobs import Arrays, chat_logprobs
from llama_tp.protocol.order import Order, ServedModel
from llama_tp.text.call_grammar import CallDelta
from llama_tp.text.tool_calls import ToolCallParser

_OBJECTS = {"chat": "chat.completion.chunk", "completion": "text_completion"}


class _Choice:
    """The book about one choice of the reply. `parser` looks for calls in its text, where there are
    tools."""

    def __init__(self, arrays: Arrays, parser: ToolCallParser | None):
        self.arrays, self.parser = arrays, parser
        self.n_tokens = 0
        self.begun = self.ended = False
        # deltas that came before the prompt's logprobs, which go in front of them
        self.waiting: list[Delta] = []


class Chunks:
    """The chunks of one order's reply, as dicts: `begin()`, then `take(delta)` for every delta,
    then `end()`.

    Args:
        created: whole seconds since 1970, or what the caller puts there.
        fingerprint: the reply's system_fingerprint.
    """

    def __init__(
        self, order: Order, model: ServedModel, created: int, fingerprint: str | None = None
    ):
        self.order, self.model = order, model
        self._head = {
            "id": order.id,
            "object": _OBJECTS[order.kind],
            "created": created,
            "model": model.name,
            "system_fingerprint": fingerprint,
        }
        self._numbers = {request.id: i for i, request in enumerate(order.requests)}
        self._scored = order.echo is not None and order.logprobs is not None
        self._prompt_scores: dict[int, tuple[TokenLogprobs | None, ...]] = {}  # by request
        self._python_tag = model.tokenizer.specials.get("<|python_tag|>")
        self._choices = [
            _Choice(
                Arrays(
                    model,
                    0 if order.echo is None or self._scored else len(order.echo[i // order.n]),
                ),
                self._parser(i),
            )
            for i in range(order.n_choices)
        ]

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return all(choice.ended for choice in self._choices)

    def usage(self) -> dict[str, Any]:
        """The counts up to now; a prompt counts once, however many samples it has."""
        n_prompt = sum(len(request.prompt_ids) for request in self.order.requests)
        n_output = sum(choice.n_tokens for choice in self._choices)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_output,
            "total_tokens": n_prompt + n_output,
        }

    def begin(self) -> list[dict[str, Any]]:
        """What can be sent before the first token: in a chat, who speaks."""
        if self.order.kind != "chat":
            return []
        return [
            self._chunk(
                {
                    "index": i,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
            )
            for i in range(self.order.n_choices)
        ]

    def take(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of what one sample gained. Raises RequestError if the engine has given the
        sample up: 500, or 400 where the request was at fault."""
        if delta.refused:
            raise RequestError(*delta.refused, code="invalid_value")
        if delta.finish_reason == "abort":
            raise RequestError(
                "the engine ended this request",
                delta.error or "it was aborted",
                status=500,
                code="engine_error",
            )
        number = self._numbers[delta.request_id]
        place = number * self.order.n + delta.index
        if self._scored and number not in self._prompt_scores:
            if delta.prompt_logprobs is None:
                self._choices[place].waiting.append(delta)
                return []
            self._prompt_scores[number] = delta.prompt_logprobs
            mates = range(number * self.order.n, (number + 1) * self.order.n)
            late = [(mate, each) for mate in mates for each in self._choices[mate].waiting]
            return self._grown(place, delta) + [
                chunk for mate, each in late for chunk in self._grown(mate, each)
            ]
        return self._grown(place, delta)

    def end(self) -> list[dict[str, Any]]:
        """The last chunk, with the counts, if it was asked for."""
        if not self.order.include_usage:
            return []
        return [self._head | {"choices": [], "usage": self.usage()}]

    # ------------------------------------------------------------------------------------- a choice

    def _grown(self, place: int, delta: Delta) -> list[dict[str, Any]]:
        choice, order = self._choices[place], self.order
        ids, text, scores, reason = delta.ids, delta.text, delta.logprobs, delta.finish_reason
        if reason and ids and ids[-1] in order.end_ids:
            reason = "stop"
        if order.hides_output:
            ids, text, scores, reason = (), "", (), reason and "length"
        if order.logprobs is None:
            scores = ()
        begins, choice.begun, choice.ended = not choice.begun, True, reason is not None
        choice.n_tokens += len(ids)
        if order.kind == "chat":
            said, reason = self._said(choice, ids, text, reason)
            is_news = bool(said)
            fields = {
                "index": place,
                "delta": said,
                "logprobs": chat_logprobs(self.model, scores) if scores else None,
            }
        else:
            echo = order.echo[place // order.n] if begins and order.echo is not None else ""
            is_news = bool(text or echo)
            fields = {
                "index": place,
                "text": echo + text,
                "logprobs": self._arrays(place, begins, scores),
            }
        if not (is_news or reason or scores or (order.with_ids and (ids or begins))):
            return []
        return [
            self._chunk(fields | {"finish_reason": reason} | self._ids_beside(place, begins, ids))
        ]

    def _said(
        self, choice: _Choice, ids: tuple[int, ...], text: str, reason: str | None
    ) -> tuple[dict[str, Any], str | None]:
        """The delta of a chat's message, and why it ends."""
        if choice.parser is None:
            return {"content": text} if text else {}, reason
        pieces = choice.parser.push(text, python_tag=self._python_tag in ids)
        if reason:
            pieces += choice.parser.finish()
            reason = "tool_calls" if reason == "stop" and choice.parser.n_calls else reason
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = _calls([piece for piece in pieces if isinstance(piece, CallDelta)])
        return ({"content": content} if content else {}) | (
            {"tool_calls": calls} if calls else {}
        ), reason

    def _parser(self, place: int) -> ToolCallParser | None:
        """Ids of calls follow from the reply's, so that the same request has the same answer."""
        tools = self.order.tools
        if tools is None:
            return None
        return ToolCallParser(
            tools.offered,
            tools.parallel,
            lambda index: (
                "call_"
                + hashlib.blake2b(
                    f"{self.order.id}/{place}/{index}".encode(), digest_size=12
                ).hexdigest()
            ),
        )

    def _arrays(
        self, place: int, begins: bool, scores: tuple[TokenLogprobs, ...]
    ) -> dict[str, Any] | None:
        if self.order.logprobs is None:
            return None
        front = self._prompt_scores[place // self.order.n] if begins and self._scored else ()
        return self._choices[place].arrays.take(
            (*front, *scores), first_id=self._prompt_ids(place)[0]
        )

    def _ids_beside(self, place: int, begins: bool, ids: tuple[int, ...]) -> dict[str, Any]:
        if not self.order.with_ids:
            return {}
        return {"token_ids": list(ids)} | (
            {"prompt_token_ids": self._prompt_ids(place)} if begins else {}
        )

    def _prompt_ids(self, place: int) -> list[int]:
        return self.order.requests[place // self.order.n].prompt_ids

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._head | {"choices": [choice]}
        if self.order.continuous_usage:
            return chunk | {"usage": self.usage()}
        return chunk | ({"usage": None} if self.order.include_usage else {})


def _calls(pieces: list[CallDelta]) -> list[dict[str, Any]]:
    """Pieces of calls as a chunk has them: one entry a call, with id and name where it begins."""
    entries: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        entry = entries.setdefault(
            piece.index, {"index": piece.index, "function": {"arguments": ""}}
        )
        if piece.id is not None:
            entry |= {"id": piece.id, "type": "function"}
        if piece.name is not None:
            entry["function"] = {"name": piece.name} | entry["function"]
        entry["function"]["arguments"] += piece.arguments
    return list(entries.values())


class Fold:
    """Chunks in, one reply out."""

    def __init__(self, order: Order):
        self.order = order
        self._head: dict[str, Any] = {}
        self._choices: list[dict[str, Any]] = [_empty(order, i) for i in range(order.n_choices)]
        # joined at the end: a long text would be copied each time
        self._texts: list[list[str]] = [[] for _ in self._choices]

    def add(self, chunk: dict[str, Any]) -> None:
        """Takes the next chunk of `Chunks`."""
        self._head = self._head or {
            key: chunk[key] for key in ("id", "object", "created", "model", "system_fingerprint")
        }
        for piece in chunk["choices"]:
            choice = self._choices[piece["index"]]
            said = piece["delta"] if self.order.kind == "chat" else {"content": piece["text"]}
            self._texts[piece["index"]].append(said.get("content", ""))
            for call in said.get("tool_calls", ()):
                self._add_call(choice["message"].setdefault("tool_calls", []), call)
            for name, values in (piece["logprobs"] or {}).items():
                if values is not None:
                    choice["logprobs"][name] += values
            choice["finish_reason"] = piece["finish_reason"]
            if "token_ids" in piece:
                choice["token_ids"] += piece["token_ids"]
            if "prompt_token_ids" in piece:
                choice["prompt_token_ids"] = piece["prompt_token_ids"]

    @staticmethod
    def _add_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
        if piece["index"] == len(calls):  # calls come one after the other
            calls.append(
                {"id": piece["id"], "type": "function", "function": dict(piece["function"])}
            )
        else:
            calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]

    def reply(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The whole reply, once every choice has ended."""
        for choice, texts in zip(self._choices, self._texts):
            if self.order.kind == "chat":
                choice["message"]["content"] = "".join(texts) or (
                    None if "tool_calls" in choice["message"] else ""
                )
            else:
                choice["text"] = "".join(texts)
        return self._head | {
            "object": "chat.completion" if self.order.kind == "chat" else "text_completion",
            "choices": self._choices,
            "usage": usage,
        }


def _empty(order: Order, index: int) -> dict[str, Any]:
    if order.kind == "chat":
        out: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None if order.logprobs is None else {"content": [], "refusal": None},
            "finish_reason": None,
        }
    else:
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        out = {
            "index": index,
            "text": "",
            "logprobs": None if order.logprobs is None else {name: [] for name in names},
            "finish_reason": None,
        }
    return out | ({"token_ids": []} if order.with_ids else {})


def whole_reply(chunks: Chunks, deltas: Iterable[Delta]) -> dict[str, Any]:
    """The reply of an order that does not stream, from all its deltas."""
    fold = Fold(chunks.order)
    for chunk in chunks.begin():
        fold.add(chunk)
    for delta in deltas:
        for chunk in chunks.take(delta):
            fold.add(chunk)
    return fold.reply(chunks.usage())
