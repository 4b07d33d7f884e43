"""OpenAI's own client: sync, async, streams, tools, structured answers, scores and errors, with
real ranks behind."""

import asyncio
import json
from typing import Literal

import openai
import pydantic
import pytest

from tests.servers import pretending

HELLO = dict(
    model="demo",
    messages=[{"role": "user", "content": "Who are you?"}],
    max_tokens=24,
    temperature=0,
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Verona", "Mantua"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}
# tokens: a model that is forced into JSON fills all the blanks it may, 40 between any two words
ENOUGH = 2000
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}


class Verdict(pydantic.BaseModel):
    """A schema that any model can fill within a few tokens."""

    house: Literal["Montague", "Capulet"]
    guilty: bool
    years: Literal[1, 7]


class Case(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    verdicts: list[Verdict] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120
    ) as one:
        yield one


def in_range(call) -> bool:
    arguments = json.loads(call.function.arguments)
    wanted = (
        {"town": ["Verona", "Mantua"], "days": [1, 2, 3]} if call.function.name == "weather" else {}
    )
    return (
        call.id.startswith("call_")
        and set(arguments) == set(wanted)
        and all(arguments[key] in wanted[key] for key in wanted)
    )


def test_a_stream_and_a_whole_reply_say_the_same(client):
    whole = client.chat.completions.create(**HELLO)
    assert whole.object == "chat.completion" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24 and len(whole.choices[0].message.content) > 20
    chunks = list(
        client.chat.completions.create(**HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert (
        "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage == whole.usage and {chunk.object for chunk in chunks} == {
        "chat.completion.chunk"
    }
    short = {**HELLO, "extra_body": {"regex": "[a-z ]{20}"}}  # for an end that is no limit
    # the client puts the pieces together itself
    with client.chat.completions.stream(**short) as stream:
        kinds = {event.type for event in stream}
        last = stream.get_final_completion().choices[0]
    assert (
        last.message.content == client.chat.completions.create(**short).choices[0].message.content
        and len(last.message.content) == 20
        and last.finish_reason == "stop"
    )
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_many_at_once(client, server):
    """32 streams over one async client say what they say one after the other."""
    words = [f"Speak of {word}." for word in ("love", "war", "the king", "the sea")]

    def wish(word: str) -> dict:
        return {**HELLO, "messages": [{"role": "user", "content": word}]}

    async def run():
        async with openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120
        ) as many:

            async def one(word: str) -> str:
                stream = await many.chat.completions.create(**wish(word), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(word) for word in words * 8))

    alone = [
        client.chat.completions.create(**wish(word)).choices[0].message.content for word in words
    ]
    assert len(set(alone)) == 4 and asyncio.run(run()) == alone * 8


@pytest.mark.parametrize(
    "choice, names",
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_a_tool_that_must_be_called(choice, names, seed, client):
    wish = {
        **HELLO,
        "tools": [WEATHER, CLOCK],
        "tool_choice": choice,
        "max_tokens": ENOUGH,
        "temperature": 1,
        "seed": seed,
    }
    whole = client.chat.completions.create(**wish, parallel_tool_calls=False).choices[0]
    [call] = whole.message.tool_calls
    assert (
        whole.finish_reason == "tool_calls"
        and call.function.name in names
        and in_range(call)
        and whole.message.content is None
    )
    with client.chat.completions.stream(**wish, parallel_tool_calls=False) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == (
        call.function.name,
        call.function.arguments,
    )


def test_several_calls_in_one_answer(client):
    """This model never stops calling; all of its calls are whole but for the one that the limit
    cuts."""
    wish = {
        **HELLO,
        "tools": [WEATHER, CLOCK],
        "tool_choice": "required",
        "max_tokens": ENOUGH,
        "temperature": 1,
        "seed": 1,
    }
    choice = client.chat.completions.create(**wish).choices[0]
    calls = choice.message.tool_calls
    assert (
        len(calls) > 2
        and all(map(in_range, calls[:-1]))
        and len({call.id for call in calls}) == len(calls)
    )
    pieces = {}
    for chunk in client.chat.completions.create(**wish, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or ():
            pieces[piece.index] = pieces.get(piece.index, "") + piece.function.arguments
    assert [pieces[i] for i in range(len(pieces))] == [call.function.arguments for call in calls]


def test_one_call_and_its_result_and_on(client):
    """A round of the loop that agents run: a call, its result sent back, text."""
    wish = {**HELLO, "tools": [WEATHER], "max_tokens": ENOUGH, "temperature": 1, "seed": 5}
    message = (
        client.chat.completions.create(**wish, tool_choice="required", parallel_tool_calls=False)
        .choices[0]
        .message
    )
    assert len(message.tool_calls) == 1
    result = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": '{"sky": "clear"}',
    }
    last = client.chat.completions.create(
        **{**wish, "max_tokens": 20, "messages": [*HELLO["messages"], message, result]},
        tool_choice="none",
    ).choices[0]
    assert last.message.tool_calls is None and last.message.content


def test_tools_that_may_be_called_do_not_disturb_text(client):
    reply = client.chat.completions.create(**HELLO, tools=[WEATHER]).choices[0]
    assert reply.message.content or reply.message.tool_calls


@pytest.mark.parametrize("shape, seed", [(Verdict, 1), (Verdict, 2), (Case, 3), (Case, 4)])
def test_answers_of_a_shape(shape, seed, client):
    wish = {**HELLO, "max_tokens": ENOUGH, "temperature": 1, "seed": seed}
    parsed = client.chat.completions.parse(**wish, response_format=shape).choices[0]
    assert isinstance(parsed.message.parsed, shape) and parsed.finish_reason == "stop"
    with client.chat.completions.stream(**wish, response_format=shape) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.message.parsed
    tool = openai.pydantic_function_tool(shape)
    call = client.chat.completions.parse(
        **wish, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert isinstance(call.choices[0].message.tool_calls[0].function.parsed_arguments, shape)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**wish, "max_tokens": 3}, response_format=shape)


def test_json_regex_and_grammar(client):
    wish = {**HELLO, "temperature": 1, "seed": 6, "max_tokens": 300}

    def text(**fields):
        return client.chat.completions.create(**wish, **fields).choices[0].message.content

    schema = {
        "name": "s",
        "schema": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    assert json.loads(
        text(response_format={"type": "json_schema", "json_schema": schema})
    ).keys() == {"a"}
    assert len(text(extra_body={"regex": "[a-c]{5}"})) == 5
    assert text(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}) in ("yes", "no")
    assert set(text(extra_body={"grammar": 'start: ("x" "y"){3}'})) == {"x", "y"}


def test_scores_of_completions(client):
    wish = dict(
        model="demo", prompt=["ROMEO:\nO", "JULIET:\nAy"], echo=True, logprobs=3, temperature=0
    )
    some = client.completions.create(**wish, max_tokens=4)
    none = client.completions.create(**wish, max_tokens=0)
    for choice, bare in zip(some.choices, none.choices):
        scores = choice.logprobs
        assert (
            scores.token_logprobs[0] is None
            and scores.top_logprobs[0] is None
            and all(v < 0 for v in scores.token_logprobs[1:])
        )
        for token, value, top in list(
            zip(scores.tokens, scores.token_logprobs, scores.top_logprobs)
        )[1:]:
            assert top[token] == value and 3 <= len(top) <= 4
        assert "".join(scores.tokens[1:]) == choice.text and choice.text.startswith(bare.text)
        assert bare.logprobs.token_logprobs == scores.token_logprobs[: len(bare.logprobs.tokens)]
        assert all(
            choice.text[at:].startswith(token)
            for at, token in list(zip(scores.text_offset, scores.tokens))[1:]
        )
    ids = [[5, 6, 7], [8, 9]]
    by_ids = client.completions.create(
        model="demo", prompt=ids, max_tokens=2, n=2, seed=1, extra_body={"return_token_ids": True}
    )
    assert [choice.index for choice in by_ids.choices] == [
        0,
        1,
        2,
        3,
    ] and by_ids.usage.prompt_tokens == 5


def test_models_and_request_ids(client):
    assert [model.id for model in client.models.list()] == ["demo"] and client.models.retrieve(
        "demo"
    ).id == "demo"
    raw = client.chat.completions.with_raw_response.create(
        **HELLO, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine" and raw.parse().id.startswith("chatcmpl-")
    assert client.chat.completions.create(**HELLO)._request_id


@pytest.mark.parametrize(
    "fields, error, param",
    [
        ({"temperature": 3e6}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": -5}, openai.BadRequestError, "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "O " * 5000}]},
            openai.BadRequestError,
            "messages",
        ),
        ({"tools": []}, openai.BadRequestError, "tools"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"stop": [""]}, openai.BadRequestError, "stop"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "foo"}},
                }
            },
            openai.BadRequestError,
            "response_format",
        ),
        ({"extra_body": {"regex": "("}}, openai.BadRequestError, "regex"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_client_s_own_classes_and_name_the_field(
    fields, error, param, stream, client
):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{**HELLO, **fields}, stream=stream)
    assert caught.value.param == param and caught.value.body["message"] and caught.value.request_id


def test_keys_a_full_queue_and_a_model_that_loads():
    """401, 429 and 503 as the client tells them, and that it comes again by itself where that
    helps."""
    # prompts that begin with 1 take 20 ms a step
    wish = dict(model="fake", prompt=[1, 5], max_tokens=400)
    with pretending("live", keys=["k"], max_queue=0) as server:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
        with client.completions.create(**wish, n=8, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**wish)
            assert caught.value.response.headers["retry-after"] == "1"
        assert (
            client.with_options(max_retries=3)
            .completions.create(**{**wish, "max_tokens": 1})
            .choices
        )
    with pretending("deaf", ready=False) as server:
        server.wait_listening()
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**wish)
        assert caught.value.status_code == 503 and caught.value.code == "engine_unavailable"
