"""huggingface_hub's InferenceClient against the server at URL, in an environment that has it:
python use_huggingface_hub.py URL"""

import asyncio
import json
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError

URL = sys.argv[1]
MESSAGES = [{"role": "user", "content": "Who are you?"}]
SCHEMA = {
    "type": "object",
    "required": ["town", "guests"],
    "additionalProperties": False,
    "properties": {
        "town": {"enum": ["Verona", "Mantua"]},
        "guests": {"type": "integer", "minimum": 1, "maximum": 99},
    },
}
UNTYPED = {
    "properties": {"rain": {"type": "boolean"}},
    "required": ["rain"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "curtain",
        "description": "Lets the curtain fall.",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
# as its documentation has it: a base URL like OpenAI's, or the server's own in the place of a
# model's name
CLIENTS = {"base_url": InferenceClient(base_url=URL + "/v1"), "model": InferenceClient(model=URL)}


def chat_and_stream(client: InferenceClient) -> None:
    wish = dict(messages=MESSAGES, max_tokens=20, seed=3, temperature=0.8)
    reply = client.chat_completion(**wish)
    text = reply.choices[0].message.content
    assert (
        len(text) > 10
        and reply.usage.completion_tokens == 20
        and reply.choices[0].finish_reason == "length"
    )
    assert client.chat_completion(**wish, model="any/name").model == reply.model == "demo"
    pieces = [
        piece.choices[0].delta.content or ""
        for piece in client.chat_completion(**wish, stream=True)
        if piece.choices
    ]
    assert "".join(pieces) == text and len(pieces) > 5
    # its copy of OpenAI's interface
    assert client.chat.completions.create(**wish).choices[0].message.content == text
    scored = (
        client.chat_completion(**wish, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    )
    assert len(scored) == 20 and all(len(one.top_logprobs) == 2 for one in scored)


def structured(client: InferenceClient) -> None:
    def answer(**response_format) -> str:
        return (
            client.chat_completion(
                messages=MESSAGES,
                max_tokens=2000,
                seed=1,
                temperature=1.0,
                response_format=response_format,
            )
            .choices[0]
            .message.content
        )

    # sent as json_object
    openai = {
        "type": "json_schema",
        "json_schema": {"name": "feast", "schema": SCHEMA, "strict": True},
    }
    for shape in (
        openai,
        {"type": "json", "value": SCHEMA},
        {"type": "json_object", "value": SCHEMA},
    ):
        found = json.loads(answer(**shape))
        assert found.keys() == {"town", "guests"} and found["town"] in ("Verona", "Mantua"), (
            shape,
            found,
        )
    # the documentation's schemas say no type
    assert json.loads(answer(type="json", value=UNTYPED)).keys() == {"rain"}
    assert len(answer(type="regex", value="[a-c]{5}")) == 5


def tools(client: InferenceClient) -> None:
    choice = client.chat_completion(
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice="required",
        max_tokens=500,
        seed=1,
        extra_body={"parallel_tool_calls": False},
    ).choices[0]
    [call] = choice.message.tool_calls
    assert (
        choice.finish_reason == "tool_calls"
        and call.function.name == "curtain"
        and json.loads(call.function.arguments) == {}
    )


def errors(client: InferenceClient) -> None:
    for wrong, said in [
        ({"temperature": -1.0}, "temperature"),
        ({"response_format": {"type": "json", "odd": 1}}, "response_format.odd"),
        ({"tool_prompt": "Call this:"}, "tool_prompt"),
    ]:
        try:
            client.chat_completion(messages=MESSAGES, **wrong)
        except HfHubHTTPError as error:
            assert error.response.status_code == 400 and said in str(error), error
        else:
            raise AssertionError(f"{wrong} was taken")


async def at_once() -> None:
    client = AsyncInferenceClient(base_url=URL + "/v1")
    replies = await asyncio.gather(
        *(client.chat_completion(MESSAGES, max_tokens=8, seed=i) for i in range(8))
    )
    assert all(reply.choices[0].message.content for reply in replies)
    stream = await client.chat_completion(MESSAGES, max_tokens=8, stream=True)
    assert len([piece async for piece in stream]) > 3


for name, client in CLIENTS.items():
    for check in (chat_and_stream, structured, tools, errors):
        check(client)
        print(f"{check.__name__} by {name}: right", flush=True)
asyncio.run(at_once())
