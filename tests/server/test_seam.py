"""Whatever is raised behind the middleware, and wherever, a request is answered, once, and the
server
lives.

A StopIteration out of a thread is refused by the future that should carry it; SystemExit and
KeyboardInterrupt end an event loop when a task raises them; a panic in a library written in Rust is
a BaseException, too.
"""

import asyncio
import json

import pytest

from llama_tp.protocol.reply import Chunks, Fold
from llama_tp.server import answer
from llama_tp.server.app import Served, build_app
from llama_tp.server.metrics import Metrics
from llama_tp.server.request_manager import RequestManager
from llama_tp.text.tokenizer import open_tokenizer
from tests.server.test_request_manager import STEP
from tests.servers import DEMO

TOKENIZER = open_tokenizer(None, str(DEMO))


class Panic(BaseException):
    """What pyo3 raises."""


RAISED = [
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    SystemExit,
    KeyboardInterrupt,
    Panic,
    asyncio.CancelledError,
    MemoryError,
    RecursionError,
    ValueError,
]


class Link:
    """A rank that ends every sample with its first token."""

    def __init__(self, manager: RequestManager):
        self.manager = manager

    def send(self, message: dict) -> None:
        if message["do"] == "submit":
            delta = {
                "id": message["id"],
                "index": 0,
                "ids": [5],
                "text": "x",
                "logprobs": [],
                "error": None,
                "finish_reason": "length",
            }
            asyncio.get_running_loop().call_soon(self.manager.hear, STEP | {"deltas": [delta]})


class Template:
    """Stands where a chat template does: with one, everything is prepared in a thread."""

    def encode_dialog(self, dialog, **_):
        return [1, 2]


async def ask(app, path: str, **body) -> tuple[int, bytes]:
    """(status, body) of a request to the ASGI application."""
    sent, pieces = (
        [],
        [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}],
    )

    async def receive():
        return pieces.pop() if pieces else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    await asyncio.wait_for(app(scope, receive, send), 10)
    assert [each["type"] for each in sent].count("http.response.start") == 1 and not sent[-1].get(
        "more_body"
    )
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])


def asked(path: str, chat=None, **body) -> tuple[int, bytes]:
    """The same, of the whole application; afterwards nothing of it may be left, and the next
    request finds all in order."""

    async def main():
        manager = RequestManager(100, Metrics("m"))
        manager.attach(
            Link(manager),
            {
                "max_rows": 4,
                "max_model_len": 512,
                "n_vocab": 2048,
                "deterministic": True,
                "tp": 1,
                "device": "cpu",
                "dtype": "float32",
            },
        )
        app = build_app(Served("m", TOKENIZER, manager, chat=chat))
        reply = await ask(app, path, **body)
        assert manager.n_inflight == 0 and manager._n_scores == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return reply

    return asyncio.run(main())


def raiser(error):
    def work(*args, **named):
        raise error

    return work


CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize(
    "place",
    [
        "on the loop",
        "in a thread",
        "in the template",
        "as it is written",
        "as a long one is written",
        "in the whole reply",
        "to the ranks",
    ],
)
def test_a_request_is_answered_whatever_is_raised(place, raised, monkeypatch, caplog):
    path, body, chat = "/v1/completions", {"prompt": "x", "logprobs": 1}, None
    if place == "on the loop" or place == "in a thread":
        monkeypatch.setattr("llama_tp.server.app.prepare", raiser(raised))
        body = {"prompt": "x" * (10 if "loop" in place else 10_000)}
    elif place == "in the template":
        path, body, chat = "/v1/chat/completions", CHAT, Template()
        monkeypatch.setattr(Template, "encode_dialog", raiser(raised))
    elif place == "to the ranks":
        monkeypatch.setattr(Link, "send", raiser(raised))
    else:
        monkeypatch.setattr(answer, "BIG", -1 if "long" in place else 2000)
        monkeypatch.setattr(
            *((Fold, "reply") if "whole" in place else (Chunks, "take")), raiser(raised)
        )
    status, text = asked(path, chat, **body)
    if place == "in the template" and raised is RecursionError:
        assert status == 400 and b"nested too deeply" in text
        return
    assert status == 500 and json.loads(text)["error"]["code"] == "internal_error"
    said = caplog.text
    assert raised.__name__ in said and said.count(" failed\n") == 1, (
        "and its traceback is in the log, once"
    )


@pytest.mark.parametrize("raised", RAISED)
def test_a_stream_is_ended_whatever_is_raised(raised, monkeypatch, caplog):
    monkeypatch.setattr(Chunks, "take", raiser(raised))
    status, text = asked("/v1/chat/completions", **CHAT, stream=True)
    *_, last, done, end = text.decode().split("\n\n")
    assert status == 200 and done == "data: [DONE]" and end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert raised.__name__ in caplog.text
