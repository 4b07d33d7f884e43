"""A batch job's lines: what one of the input asks for, and what its answer looks like in the
output.

Input lines are OpenAI's, {"custom_id", "method": "POST", "url", "body"}, or plain: {"prompt": ...}
or {"messages": [...]} with any fields of such a body beside it, and a custom_id if one likes.
Output lines are OpenAI's. Everything in them follows from the job's key and the line's custom_id:
no clock, no dice, hence the same bytes whenever the line is computed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama_tp.arch.errors import UserError, short
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.errors import RequestError, error_body, invalid, status_of, unsupported
from llama_tp.protocol.fields import PATHS, ChatBody, CompletionBody, check_body
from llama_tp.protocol.order import Order, ServedModel, prepare
from llama_tp.protocol.reading import read_json

MAX_LINE_BYTES = 64 << 20
MAX_ID_CHARS = 512
_ID_PREFIX = {"chat": "chatcmpl", "completion": "cmpl"}
_KEYS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Line:
    """One line of the input. `plain`: not in OpenAI's shape."""

    custom_id: str
    kind: str
    data: dict[str, Any]
    plain: bool


def lines_of(path: str, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes without the line end) of every line that is not blank, the first
    `start` of these left out. A line longer than MAX_LINE_BYTES comes cut, one byte longer than
    allowed."""
    with open(path, "rb") as f:
        number = n_seen = 0
        while raw := f.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = raw
            while not rest.endswith(b"\n") and (rest := f.readline(1 << 20)):
                continue
            raw = raw.rstrip(b"\r\n") if len(raw) <= MAX_LINE_BYTES else raw
            if raw.strip():
                n_seen += 1
                if n_seen > start:
                    yield number, raw


def custom_id_of(raw: bytes, number: int) -> str:
    """The line's own custom_id, or its number if it has none that can be used."""
    try:
        found = read_json(raw).get("custom_id") if len(raw) <= MAX_LINE_BYTES else None
    except RequestError:
        found = None
    return found if isinstance(found, str) and 0 < len(found) <= MAX_ID_CHARS else f"line-{number}"


def read_line(raw: bytes, number: int) -> Line:
    """One line, with its body not yet checked. Raises RequestError."""
    if len(raw) > MAX_LINE_BYTES:
        raise RequestError(
            "the line is too long", f"more than {MAX_LINE_BYTES >> 20} MiB", "split the request"
        )
    data = read_json(raw, "the line")
    custom_id = data.get("custom_id")
    plain = not data.keys() & {"body", "url", "method"}
    if not (plain and custom_id is None) and (
        not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS
    ):
        raise invalid(
            "custom_id",
            f"custom_id must be a text of 1 to {MAX_ID_CHARS} characters",
            f"found {short(custom_id)}",
            "give the line one",
        )
    custom_id = custom_id or f"line-{number}"
    if plain:
        body = {key: value for key, value in data.items() if key != "custom_id"}
        if ("prompt" in body) == ("messages" in body):
            raise RequestError(
                "a line needs a prompt or messages",
                f"found the keys {str(list(data))[:200]}",
                'write {"prompt": "..."}, {"messages": [...]}, or an OpenAI batch line',
            )
        return Line(custom_id, "chat" if "messages" in body else "completion", body, True)
    if unknown := [key for key in data if key not in _KEYS]:
        raise unsupported(
            unknown[0][:64], "", f"a batch line has the keys {', '.join(sorted(_KEYS))}"
        )
    if data.get("method") != "POST":
        raise invalid(
            "method",
            'method must be "POST"',
            f"found {short(data.get('method'))}",
            "correct the line",
        )
    if not isinstance(data.get("url"), str) or data["url"] not in PATHS:
        raise invalid(
            "url",
            f"url must be one of {', '.join(PATHS)}",
            f"found {short(data.get('url'))}",
            "correct the line",
        )
    if not isinstance(data.get("body"), dict):
        raise invalid(
            "body",
            "body must be an object",
            f"found {type(data.get('body')).__name__}",
            "correct the line",
        )
    return Line(custom_id, PATHS[data["url"]], data["body"], False)


def order_of(line: Line, model: ServedModel, defaults: SamplingDefaults, key: bytes) -> Order:
    """What the engine is to run for a line. Raises RequestError for a body that cannot be run."""
    # a plain line means what `generate` does where nobody says anything: as many tokens as the
    # context holds
    below = (
        {"temperature": 0.6, "top_p": 0.9, "max_tokens": model.max_seq_len} if line.plain else {}
    )
    body: ChatBody | CompletionBody = check_body(
        line.kind, defaults.fill(line.data, line.kind, below)
    )
    if body.stream:
        raise unsupported("stream", "found true", "a batch writes whole replies: leave it out")
    reply_id = f"{_ID_PREFIX[line.kind]}-{_hash(key, line.custom_id, 'reply')[:24]}"
    return prepare(
        body, model, reply_id, seed=int(_hash(key, line.custom_id, "seed")[:16], 16) >> 1
    )


def created_of(key: bytes) -> int:
    """The `created` of all of a job's replies: it says which job, not when, as a moment would
    differ from run to run."""
    return int(_hash(key, "", "created")[:8], 16) >> 1


def answer(custom_id: str, key: bytes, reply: dict[str, Any]) -> bytes:
    """The output line of a request that was answered."""
    return _line(custom_id, key, 200, reply, None)


def refusal(custom_id: str, key: bytes, error: UserError) -> bytes:
    """The output line of a request that was not answered: the status and body that a server would
    have sent, and the same in `error` for readers who look only there."""
    body = error_body(error)
    told = {
        "code": body["error"]["code"] or body["error"]["type"],
        "message": body["error"]["message"],
    }
    return _line(custom_id, key, status_of(error), body, told)


def beginning(custom_id: str, key: bytes) -> bytes:
    """How the output line of `custom_id` begins, whatever its answer; its http status follows."""
    line_id = f"batch_req_{_hash(key, custom_id, 'line')[:24]}"
    quoted = json.dumps(custom_id, ensure_ascii=False)
    return f'{{"id": "{line_id}", "custom_id": {quoted}, "response": {{"status_code": '.encode()


def has_failed(line: bytes, begins: bytes) -> bool:
    """Whether an output line that begins so tells of a failure."""
    return not line[len(begins) :].startswith(b"200,")


def _line(
    custom_id: str, key: bytes, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> bytes:
    rest = {"request_id": f"req_{_hash(key, custom_id, 'request')[:24]}", "body": body}
    said = json.dumps(rest, ensure_ascii=False, allow_nan=False)[1:]
    return (
        beginning(custom_id, key)
        + f'{status}, {said}, "error": {json.dumps(error, ensure_ascii=False)}}}\n'.encode()
    )


def _hash(key: bytes, custom_id: str, what: str) -> str:
    return hashlib.blake2b(f"{what}/{custom_id}".encode(), key=key[:64], digest_size=16).hexdigest()
