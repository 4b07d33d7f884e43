"""What goes over the wire, byte for byte: transcripts in golden/, each asked for and read by the
real openai client.

The client talks to the application in this process; in the place of ranks stands a link that
answers with the case's texts, and ids and clock stand still. A change that is meant: `pytest
tests/test_golden_sse.py --rewrite`, then read the diff.
"""

import asyncio
import json
import math
from pathlib import Path

import httpx2
import openai
import pytest

import llama_tp.server.app
from llama_tp.server.app import Served, build_app
from llama_tp.server.metrics import Metrics
from llama_tp.server.request_manager import RequestManager
from llama_tp.text.stream import TextStream
from llama_tp.text.tokenizer import open_tokenizer
from tests.ranks import PATIENCE_S
from tests.servers import DEMO

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = open_tokenizer(None, str(DEMO))
INFO = {
    "n_vocab": TOKENIZER.n_vocab,
    "max_model_len": 2048,
    "max_rows": 8,
    "n_blocks": 100,
    "block_size": 16,
    "tp": 2,
    "device": "cpu",
    "dtype": "float32",
    "deterministic": True,
}
HI = [{"role": "user", "content": "Who goes there?"}]
TOWN = {
    "type": "object",
    "properties": {"town": {"enum": ["Verona", "Mantua"]}},
    "required": ["town"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a town", "parameters": TOWN},
    },
    {"type": "function", "function": {"name": "clock"}},
]
CALLS = '{"name": "weather", "parameters": {"town": "Verona"}}; {"name": "clock", "parameters": {}}'
STATS = {
    "n_running": 0,
    "n_waiting": 0,
    "kv_use": 0.0,
    "n_preemptions": 0,
    "prefix_hit_tokens": 0,
    "n_steps": 0,
    "prefill_tokens": 0,
}
REASONS = {"stop": "stop", "length": "length", "abort": "abort", "death": None}


class Link:
    """Answers at once, a token a step: sample j writes `texts[j]` and ends for `reason`; with
    "death" the ranks are gone for good before an end."""

    def __init__(self, manager: RequestManager, texts: list[str], reason: str):
        self.manager, self.texts, self.reason = manager, texts, reason

    def send(self, message: dict) -> None:
        if message["do"] == "submit":
            asyncio.get_running_loop().call_soon(self.answer, message)

    def answer(self, message: dict) -> None:
        name, params = message["id"], message["params"]
        if params["prompt_logprobs"] is not None:
            scores = [
                None,
                *(score(token, params["prompt_logprobs"]) for token in message["prompt"][1:]),
            ]
            self.manager.hear({"is": "scores", "id": name, "scores": scores})
        rows = [
            (TOKENIZER.encode(self.texts[index]), TextStream(TOKENIZER))
            for index in range(params["n"])
        ]
        for step in range(max(len(ids) for ids, _ in rows) + 1):
            deltas = []
            for index, (ids, text) in enumerate(rows):
                new, over = ids[step : step + 1], step == len(ids)
                if step <= len(ids) and not (over and self.reason == "death"):
                    scores = [
                        score(token, params["logprobs"])
                        for token in new
                        if params["logprobs"] is not None
                    ]
                    deltas.append(
                        {
                            "id": name,
                            "index": index,
                            "ids": new,
                            "text": text.push(new),
                            "logprobs": scores,
                            "finish_reason": REASONS[self.reason] if over else None,
                            "error": "its numbers are not finite"
                            if over and self.reason == "abort"
                            else None,
                        }
                    )
            self.manager.hear(
                {
                    "is": "step",
                    "deltas": deltas,
                    "refused": {},
                    "begun": [],
                    "step_s": 0.0,
                    "stats": STATS,
                }
            )
        if self.reason == "death":
            self.manager.give_up("tested")


def score(token: int, k: int) -> list:
    """A logprob that says which token it is of, and k likelier ones; the unlikeliest is what stands
    for minus infinity."""
    own = -9999.0 if token % 7 == 0 else -math.log(token + 2)
    return [token, own, [[token + 1 + i, -(i + 1) / 8] for i in range(k)]]


class Recorder(httpx2.ASGITransport):
    """The application as a transport; what it sends is kept as well."""

    async def handle_async_request(self, request):
        reply = await super().handle_async_request(request)
        self.status, self.body = (
            reply.status_code,
            b"".join([piece async for piece in reply.stream]),
        )
        return httpx2.Response(reply.status_code, headers=reply.headers, content=self.body)


def asked(
    monkeypatch, call, texts: list[str], reason: str = "stop", **options
) -> tuple[Recorder, object]:
    """What the client gets for `call(client)`, folded if it streams, or the error that it raises;
    and what came over the wire."""
    monkeypatch.setattr(llama_tp.server.app, "version", lambda: "0")

    async def run():
        manager = RequestManager(64, Metrics("demo"))
        manager.attach(Link(manager, texts, reason), INFO)
        served = Served(
            "demo", TOKENIZER, manager, clock=lambda: 1.5e9, new_id=lambda: "0", strict_name=True
        )
        recorder = Recorder(build_app(served, **options))
        http = httpx2.AsyncClient(transport=recorder)
        async with openai.AsyncOpenAI(
            base_url="http://test/v1", api_key="k", max_retries=0, http_client=http
        ) as client:
            try:
                reply = await call(client)
                return recorder, [chunk async for chunk in reply] if isinstance(
                    reply, openai.AsyncStream
                ) else reply
            except openai.APIError as error:
                return recorder, error

    return asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def chat(**fields):
    return lambda client: client.chat.completions.create(
        **{"model": "demo", "messages": HI, "max_tokens": 64} | fields
    )


def completion(**fields):
    return lambda client: client.completions.create(
        **{"model": "demo", "prompt": "ROMEO:", "max_tokens": 16} | fields
    )


def said(chunks: list, index: int = 0) -> str:
    """The text of one choice of a stream."""
    return "".join(
        (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
        for chunk in chunks
        for choice in chunk.choices
        if choice.index == index
    )


def reasons(chunks: list) -> list:
    return [
        (choice.index, choice.finish_reason)
        for chunk in chunks
        for choice in chunk.choices
        if choice.finish_reason
    ]


def called(chunks: list) -> list[tuple]:
    """(id, name, arguments) of each call, put together from a stream as clients do."""
    calls = {}
    for piece in (
        piece
        for chunk in chunks
        for choice in chunk.choices
        for piece in choice.delta.tool_calls or ()
    ):
        call = calls.setdefault(piece.index, [piece.id, piece.function.name, ""])
        call[2] += piece.function.arguments
    return [(id, name, json.loads(arguments)) for id, name, arguments in calls.values()]


def has_text(text: str, reason: str = "stop"):
    return lambda chunks: said(chunks) == text and reasons(chunks) == [(0, reason)]


def is_usage(chunks: list) -> bool:
    *others, last = chunks
    n_prompt, n_output = (
        last.usage.prompt_tokens,
        len(TOKENIZER.encode("I, Romeo.") + TOKENIZER.encode("Nay.")),
    )
    assert (said(chunks, 0), said(chunks, 1)) == ("I, Romeo.", "Nay.")
    assert sorted(reasons(chunks)) == [(0, "stop"), (1, "stop")] and all(
        chunk.usage is None for chunk in others
    )
    return last.choices == [] and (last.usage.completion_tokens, last.usage.total_tokens) == (
        n_output,
        n_prompt + n_output,
    )


def is_scored_chat(chunks: list) -> bool:
    entries = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert (
        b"".join(bytes(entry.bytes) for entry in entries).decode() == said(chunks) == "O naïve 😀"
    )
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    return [entry.logprob for entry in entries] == [
        score(token, 0)[1] for token in TOKENIZER.encode("O naïve 😀")
    ]


def is_scored_text(chunks: list) -> bool:
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("ROMEO:"), *TOKENIZER.encode("O me!")]
    arrays = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    tokens, numbers, tops = (
        [one for each in arrays for one in getattr(each, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs")
    )
    assert (
        said(chunks) == "ROMEO:O me!"
        and numbers == [None, *(score(token, 0)[1] for token in ids[1:])]
        and tops[0] is None
    )
    return all(top[token] == number for token, top, number in list(zip(tokens, tops, numbers))[1:])


def is_both_calls(chunks: list) -> bool:
    (first, *one), (second, *two) = called(chunks)
    assert first.startswith("call_") and second.startswith("call_") and first != second
    assert said(chunks) == "" and reasons(chunks) == [(0, "tool_calls")]
    return [one, two] == [["weather", {"town": "Verona"}], ["clock", {}]]


def is_text_and_call(chunks: list) -> bool:
    return said(chunks).strip() == "Let me see." and [call[1:] for call in called(chunks)] == [
        ("weather", {"town": "Mantua"})
    ]


def is_two_replies(reply) -> bool:
    return [choice.message.content for choice in reply.choices] == [
        "I, Romeo.",
        "Nay.",
    ] and reply.created == 1_500_000_000


def is_whole_calls(reply) -> bool:
    [choice] = reply.choices
    calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in choice.message.tool_calls
    ]
    return (
        calls == [("weather", {"town": "Verona"}), ("clock", {})]
        and choice.finish_reason == "tool_calls"
        and (choice.message.content is None)
    )


def is_scored_reply(reply) -> bool:
    return (
        reply.choices[0].text == "ROMEO:O me!"
        and reply.choices[0].logprobs.token_logprobs[0] is None
    )


def is_error(kind: type, **expected):
    return lambda error: (
        isinstance(error, kind)
        and all(getattr(error, name) == value for name, value in expected.items())
    )


AFTER_TEXT = 'Let me see.\n<function=weather>{"town": "Mantua"}</function>'
# Name of the transcript: (what is asked, what the ranks write, how they end, what the client must
# make of it).
CASES = {
    "chat.sse": (
        chat(stream=True),
        ["I, Romeo, naïve 😀."],
        "stop",
        has_text("I, Romeo, naïve 😀."),
    ),
    "chat_two_samples_usage.sse": (
        chat(stream=True, n=2, stream_options={"include_usage": True}),
        ["I, Romeo.", "Nay."],
        "stop",
        is_usage,
    ),
    "chat_logprobs.sse": (
        chat(stream=True, logprobs=True, top_logprobs=2),
        ["O naïve 😀"],
        "length",
        is_scored_chat,
    ),
    "completion.sse": (
        completion(stream=True, echo=True),
        ["\nO me!"],
        "length",
        has_text("ROMEO:\nO me!", "length"),
    ),
    "completion_logprobs.sse": (
        completion(stream=True, echo=True, logprobs=2),
        ["O me!"],
        "length",
        is_scored_text,
    ),
    "tools.sse": (chat(stream=True, tools=TOOLS), [CALLS], "stop", is_both_calls),
    "tools_after_text.sse": (
        chat(stream=True, tools=TOOLS),
        [AFTER_TEXT],
        "stop",
        is_text_and_call,
    ),
    "tools_required.sse": (
        chat(stream=True, tools=TOOLS, tool_choice="required"),
        [CALLS],
        "stop",
        is_both_calls,
    ),
    "tools_not_called.sse": (
        chat(stream=True, tools=TOOLS),
        ['{"name": "no tool"} is JSON.'],
        "stop",
        has_text('{"name": "no tool"} is JSON.'),
    ),
    "error_ranks_gone.sse": (
        chat(stream=True),
        ["I, Romeo"],
        "death",
        is_error(openai.APIError, code="engine_unavailable", type="server_error"),
    ),
    "error_not_finite.sse": (
        completion(stream=True),
        ["O"],
        "abort",
        is_error(openai.APIError, code="engine_error", type="server_error", param=None),
    ),
    "chat.json": (chat(n=2), ["I, Romeo.", "Nay."], "stop", is_two_replies),
    "tools.json": (chat(tools=TOOLS), [CALLS], "stop", is_whole_calls),
    "completion_logprobs.json": (
        completion(echo=True, logprobs=2),
        ["O me!"],
        "length",
        is_scored_reply,
    ),
    "error_value.json": (
        chat(temperature=-1),
        [],
        "stop",
        is_error(openai.BadRequestError, param="temperature", code="invalid_value"),
    ),
    "error_field.json": (
        completion(suffix="x"),
        [],
        "stop",
        is_error(openai.BadRequestError, param="suffix", code="unsupported_parameter"),
    ),
    "error_model.json": (
        chat(model="gpt-4o"),
        [],
        "stop",
        is_error(openai.NotFoundError, param="model", code="model_not_found"),
    ),
    "error_too_long.json": (
        completion(prompt=[5] * 3000),
        [],
        "stop",
        is_error(openai.BadRequestError, code="context_length_exceeded"),
    ),
    "error_abort.json": (
        chat(),
        ["I"],
        "abort",
        is_error(openai.InternalServerError, code="engine_error", status_code=500),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_transcript(name, monkeypatch, request):
    call, texts, reason, is_right = CASES[name]
    recorder, seen = asked(monkeypatch, call, texts, reason)
    assert is_right(seen), (seen, recorder.body)
    if request.config.getoption("--rewrite"):
        (GOLDEN / name).write_bytes(recorder.body)
    assert recorder.body == (GOLDEN / name).read_bytes(), (
        "see the top of this file for a change that is meant"
    )


def test_every_transcript_has_its_case():
    assert {path.name for path in GOLDEN.iterdir()} - {"README.md"} == set(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith(".sse")])
def test_streams_are_events_that_end_once(name):
    *events, end, nothing = (GOLDEN / name).read_bytes().decode().split("\n\n")
    assert (
        end == "data: [DONE]"
        and nothing == ""
        and all(event.startswith("data: {") and "\n" not in event for event in events)
    )
    assert ["error" in json.loads(event[6:]) for event in events].count(True) == name.startswith(
        "error"
    )
