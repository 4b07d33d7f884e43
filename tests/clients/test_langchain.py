"""langchain-openai's ChatOpenAI: invoke, stream, tools and structured output, with real ranks
behind."""

import asyncio
from typing import Literal

import pydantic
import pytest

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="a client of the extra llama_tp[clients]: make test-clients"
)
messages = pytest.importorskip(
    "langchain_core.messages", reason="a client of the extra llama_tp[clients]: make test-clients"
)


# more properties would be more of the model's nonsense, without end
class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather of a town."""

    town: Literal["Verona", "Mantua"]
    rain: bool


@pytest.fixture(scope="module")
def chat(server):
    return langchain_openai.ChatOpenAI(
        base_url=server.url + "/v1",
        api_key="none",
        model="demo",
        max_tokens=2000,
        temperature=0.8,
        seed=4,
        max_retries=0,
        timeout=120,
    )


def test_invoke_stream_and_batch(chat):
    short = chat.bind(max_tokens=24)
    whole = short.invoke("Who are you?")
    assert len(whole.content) > 20 and whole.usage_metadata["output_tokens"] == 24
    assert (
        whole.response_metadata["finish_reason"] == "length"
        and whole.response_metadata["model_name"] == "demo"
    )
    pieces = list(short.stream("Who are you?", stream_usage=True))
    assert "".join(piece.content for piece in pieces) == whole.content and len(pieces) > 5
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    assert total.usage_metadata["output_tokens"] == 24
    assert [reply.content for reply in short.batch(["Who are you?"] * 4)] == [whole.content] * 4
    assert asyncio.run(short.ainvoke("Who are you?")).content == whole.content


def test_logprobs(chat):
    reply = chat.bind(max_tokens=5, logprobs=True, top_logprobs=2).invoke("Hi")
    assert len(reply.response_metadata["logprobs"]["content"]) == 5


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method, chat):
    found = chat.with_structured_output(Weather, method=method).invoke("How is the weather?")
    assert isinstance(found, Weather)


def test_json_mode(chat):
    schema = {
        "title": "yes",
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    assert chat.with_structured_output(schema, method="json_schema").invoke("Is it?").keys() == {
        "yes"
    }


def test_tools_and_their_results(chat):
    bound = chat.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    called = bound.invoke("How is the weather?")
    [call] = called.tool_calls
    assert call["name"] == "Weather" and Weather(**call["args"]) and not called.invalid_tool_calls
    total = None
    for piece in bound.stream("How is the weather?"):
        total = piece if total is None else total + piece
    assert [(each["name"], each["args"]) for each in total.tool_calls] == [
        (call["name"], call["args"])
    ]
    result = messages.ToolMessage("clear", tool_call_id=call["id"])
    reply = (
        chat.bind_tools([Weather], tool_choice="none")
        .bind(max_tokens=20)
        .invoke([messages.HumanMessage("How is the weather?"), called, result])
    )
    assert reply.content and not reply.tool_calls
