"""From what the engine's samples gain to OpenAI's replies. One producer, two presenters: `Chunks` makes the chunks of a stream,
which a stream sends as they are, and `Fold` folds them into the one reply of a request that does not stream.

A delta is the engine's `Delta` or anything with its attributes: request_id, index, ids, text, logprobs, finish_reason, error,
prompt_logprobs. Knows no clock and no dice: `created` and ids come from the caller.
"""

from collections.abc import Iterable

from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.logprobs import Arrays, chat_logprobs
from llama_tp.protocol.order import Order, ServedModel

_OBJECTS = {"chat": "chat.completion.chunk", "completion": "text_completion"}


class _Choice:
    """The book about one choice of the reply."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays
        self.n_tokens = 0
        self.begun = self.ended = False
        self.waiting: list = []         # deltas that came before the prompt's logprobs, which go in front of them


class Chunks:
    """The chunks of one order's reply, as dicts: `begin()`, then `take(delta)` for every delta, then `end()`.

    Args:
        created: whole seconds since 1970, or what the caller puts there.
        fingerprint: the reply's system_fingerprint.
    """

    def __init__(self, order: Order, model: ServedModel, created: int, fingerprint: str | None = None):
        self.order, self.model = order, model
        self._head = {"id": order.id, "object": _OBJECTS[order.kind], "created": created, "model": model.name,
                      "system_fingerprint": fingerprint}
        self._numbers = {request.id: i for i, request in enumerate(order.requests)}
        self._scored = order.echo is not None and order.logprobs is not None
        self._prompt_scores: dict[int, tuple] = {}                      # by request
        self._choices = [_Choice(Arrays(model, 0 if order.echo is None or self._scored else len(order.echo[i // order.n])))
                         for i in range(order.n_choices)]

    @property
    def done(self) -> bool:
        """Every choice has ended."""
        return all(choice.ended for choice in self._choices)

    def usage(self) -> dict:
        """The counts up to now; a prompt counts once, however many samples it has."""
        n_prompt = sum(len(request.prompt_ids) for request in self.order.requests)
        n_output = sum(choice.n_tokens for choice in self._choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_output, "total_tokens": n_prompt + n_output}

    def begin(self) -> list[dict]:
        """What can be sent before the first token: in a chat, who speaks."""
        if self.order.kind != "chat":
            return []
        return [self._chunk({"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})
                for i in range(self.order.n_choices)]

    def take(self, delta) -> list[dict]:
        """The chunks of what one sample gained. Raises RequestError (500) if the engine has given the sample up."""
        if delta.finish_reason == "abort":
            raise RequestError("the engine ended this request", delta.error or "it was aborted", status=500, code="engine_error")
        number = self._numbers[delta.request_id]
        place = number * self.order.n + delta.index
        if self._scored and number not in self._prompt_scores:
            if delta.prompt_logprobs is None:
                self._choices[place].waiting.append(delta)
                return []
            self._prompt_scores[number] = delta.prompt_logprobs
            mates = range(number * self.order.n, (number + 1) * self.order.n)
            late = [(mate, each) for mate in mates for each in self._choices[mate].waiting]
            return self._grown(place, delta) + [chunk for mate, each in late for chunk in self._grown(mate, each)]
        return self._grown(place, delta)

    def end(self) -> list[dict]:
        """The last chunk, with the counts, if it was asked for."""
        if not self.order.include_usage:
            return []
        return [self._head | {"choices": [], "usage": self.usage()}]

    # -------------------------------------------------------------------------------------------------------- a choice

    def _grown(self, place: int, delta) -> list[dict]:
        choice, order = self._choices[place], self.order
        ids, text, scores = tuple(delta.ids), delta.text, tuple(delta.logprobs)
        reason = delta.finish_reason
        if reason and ids and ids[-1] in order.end_ids:
            reason = "stop"
        if order.hides_output:
            ids, text, scores, reason = (), "", (), reason and "length"
        opening = self._opening(place) if not choice.begun else {}
        choice.begun, choice.ended = True, reason is not None
        choice.n_tokens += len(ids)
        if not (text or reason or opening or (scores and order.logprobs is not None) or (ids and order.with_ids)):
            return []
        if order.kind == "chat":
            fields = {"index": place, "delta": {"content": text} if text else {}, "finish_reason": reason,
                      "logprobs": chat_logprobs(self.model, scores) if order.logprobs is not None and scores else None}
        else:
            fields = {"index": place, "text": opening.get("text", "") + text, "finish_reason": reason,
                      "logprobs": self._arrays(place, opening, scores)}
        if order.with_ids:
            fields["token_ids"] = list(ids)
            if opening and order.kind == "completion":
                fields["prompt_token_ids"] = self._prompt_ids(place)
        return [self._chunk(fields, {"prompt_token_ids": self._prompt_ids(place)} if opening and order.kind == "chat"
                            and order.with_ids else {})]

    def _opening(self, place: int) -> dict:
        """What stands in front of a choice's first text."""
        order = self.order
        opening: dict = {"ids": True} if order.with_ids else {}
        if order.echo is not None:
            opening["text"] = order.echo[place // order.n]
            if self._scored:
                opening["scores"] = self._prompt_scores[place // order.n]
        return opening

    def _arrays(self, place: int, opening: dict, scores: tuple) -> dict | None:
        if self.order.logprobs is None:
            return None
        return self._choices[place].arrays.take((*opening.get("scores", ()), *scores), first_id=self._prompt_ids(place)[0])

    def _prompt_ids(self, place: int) -> list[int]:
        return self.order.requests[place // self.order.n].prompt_ids

    def _chunk(self, choice: dict, extra: dict | None = None) -> dict:
        chunk = self._head | {"choices": [choice]} | (extra or {})
        if self.order.continuous_usage:
            return chunk | {"usage": self.usage()}
        return chunk | ({"usage": None} if self.order.include_usage else {})


class Fold:
    """Chunks in, one reply out."""

    def __init__(self, order: Order):
        self.order = order
        self._head: dict = {}
        self._choices: list[dict] = [_empty(order, i) for i in range(order.n_choices)]
        self._texts: list[list[str]] = [[] for _ in self._choices]      # joined at the end: a long text would be copied each time
        self._prompt_ids: list[int] | None = None

    def add(self, chunk: dict) -> None:
        """Takes the next chunk of `Chunks`."""
        self._head = self._head or {key: chunk[key] for key in ("id", "object", "created", "model", "system_fingerprint")}
        self._prompt_ids = chunk.get("prompt_token_ids", self._prompt_ids)
        for piece in chunk["choices"]:
            choice = self._choices[piece["index"]]
            self._texts[piece["index"]].append(piece["delta"].get("content", "") if self.order.kind == "chat" else piece["text"])
            for name, values in (piece["logprobs"] or {}).items():
                if values is not None:
                    choice["logprobs"][name] += values
            choice["finish_reason"] = piece["finish_reason"]
            if "token_ids" in piece:
                choice["token_ids"] += piece["token_ids"]
            if "prompt_token_ids" in piece:
                choice["prompt_token_ids"] = piece["prompt_token_ids"]

    def reply(self, usage: dict) -> dict:
        """The whole reply, once every choice has ended."""
        for choice, texts in zip(self._choices, self._texts):
            if self.order.kind == "chat":
                choice["message"]["content"] = "".join(texts)
            else:
                choice["text"] = "".join(texts)
        out = self._head | {"object": "chat.completion" if self.order.kind == "chat" else "text_completion",
                            "choices": self._choices, "usage": usage}
        return out if self._prompt_ids is None else out | {"prompt_token_ids": self._prompt_ids}


def _empty(order: Order, index: int) -> dict:
    if order.kind == "chat":
        out: dict = {"index": index, "message": {"role": "assistant", "content": "", "refusal": None},
                     "logprobs": None if order.logprobs is None else {"content": [], "refusal": None}, "finish_reason": None}
    else:
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        out = {"index": index, "text": "", "logprobs": None if order.logprobs is None else {name: [] for name in names},
               "finish_reason": None}
    return out | ({"token_ids": []} if order.with_ids else {})


def whole_reply(chunks: Chunks, deltas: Iterable) -> dict:
    """The reply of an order that does not stream, from all its deltas."""
    fold = Fold(chunks.order)
    for chunk in chunks.begin():
        fold.add(chunk)
    for delta in deltas:
        for chunk in chunks.take(delta):
            fold.add(chunk)
    return fold.reply(chunks.usage())
