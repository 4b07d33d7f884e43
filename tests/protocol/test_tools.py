"""Tools: what a chat offers, what the model writes of it, and what the client gets to read."""

import json
from dataclasses import replace

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llama_tp.protocol.errors import RequestError, error_body
from llama_tp.protocol.fields import check_body
from llama_tp.protocol.order import Order, prepare
from llama_tp.protocol.reply import Chunks, whole_reply
from llama_tp.text.chat_format import ChatFormat
from tests.protocol.served import MODEL as SHORT
from tests.protocol.served import TOKENIZER, USER, delta

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}},
            "required": ["town"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
# the demo model's tokens are short, and the words about tools long
MODEL = replace(SHORT, max_seq_len=2048)
CALLS = '{"name": "weather", "parameters": {"town": "Verona"}}; {"name": "clock", "parameters": {}}'


def chat(**fields) -> Order:
    return prepare(check_body("chat", {"messages": USER} | fields), MODEL, "chatcmpl-1")


def refused(**fields) -> dict:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    return error_body(caught.value)["error"]


def written(order: Order, text: str, index: int = 0, end: str = "stop") -> list:
    """A text as the engine writes it: three characters a step, and an end of its own."""
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    return [delta(order, piece, TOKENIZER.encode(piece), index) for piece in pieces] + [
        delta(order, "", (), index, end=end)
    ]


def message(order: Order, deltas: list) -> dict:
    found = whole_reply(Chunks(order, MODEL, 1), deltas)
    ChatCompletion.model_validate(found)
    return found["choices"][0]


def test_the_model_is_told_of_tools():
    expected = ChatFormat(TOKENIZER).encode_dialog(USER, tools=[WEATHER])
    for order in (chat(tools=[WEATHER]), chat(tools=[WEATHER], tool_choice="auto")):
        assert order.requests[0].prompt_ids == expected
    assert "Verona" not in TOKENIZER.decode(expected) and "Of a town" in TOKENIZER.decode(expected)
    plain = chat(tools=[WEATHER], tool_choice="none")
    assert plain.requests[0].prompt_ids == chat().requests[0].prompt_ids and plain.tools is None


def function(**more) -> dict:
    return {"type": "function", "function": {"name": "f"} | more}


@pytest.mark.parametrize(
    "fields, param, code",
    [
        ({"tools": []}, "tools", "invalid_value"),
        ({"tools": [5]}, "tools[0]", "invalid_value"),
        ({"tools": "f"}, "tools", "invalid_value"),
        ({"tools": [{}]}, "tools[0]", "invalid_value"),
        ({"tools": [WEATHER] * 129}, "tools", "invalid_value"),
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools", "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0]", "invalid_value"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "invalid_value"),
        ({"tools": [CLOCK | {"odd": 1}]}, "tools[0].odd", "unsupported_parameter"),
        ({"tools": [function(strict=1)]}, "tools[0].function.strict", "invalid_value"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "invalid_value"),
        ({"tools": [WEATHER], "tool_choice": function()}, "tool_choice", "invalid_value"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": "f"}},
            "tool_choice",
            "invalid_value",
        ),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "invalid_value"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_value"),
    ],
)
def test_tools_that_are_refused(fields, param, code):
    said = refused(**fields)
    assert (said["param"], said["code"]) == (param, code), said


def test_a_schema_of_great_depth_is_refused_and_no_crash():
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    assert (
        "too deeply"
        in refused(tools=[{"type": "function", "function": {"name": "f", "parameters": deep}}])[
            "message"
        ]
    )


def test_calls_are_read_out_of_the_text():
    order = chat(tools=[WEATHER, CLOCK])
    choice = message(order, written(order, CALLS))
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    first, second = choice["message"]["tool_calls"]
    assert (first["function"]["name"], json.loads(first["function"]["arguments"])) == (
        "weather",
        {"town": "Verona"},
    )
    assert (second["function"]["name"], json.loads(second["function"]["arguments"])) == (
        "clock",
        {},
    )
    assert (
        first["type"] == "function"
        and first["id"].startswith("call_")
        and first["id"] != second["id"]
    )
    again = message(order, written(order, CALLS))
    assert again == choice  # ids too: they follow from the reply's
    order = chat(tools=[WEATHER, CLOCK], parallel_tool_calls=False)
    [only] = message(order, written(order, CALLS))["message"]["tool_calls"]
    assert only["function"]["name"] == "weather"


def test_calls_of_two_samples_have_ids_of_their_own():
    order = chat(tools=[WEATHER], n=2)
    found = whole_reply(
        Chunks(order, MODEL, 1),
        written(order, CALLS.split(";")[0]) + written(order, CALLS.split(";")[0], 1),
    )
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in found["choices"]]
    assert len(set(ids)) == 2


def test_calls_stream():
    order = chat(tools=[WEATHER, CLOCK])
    chunks = Chunks(order, MODEL, 1)
    out = [
        *chunks.begin(),
        *(chunk for each in written(order, CALLS) for chunk in chunks.take(each)),
    ]
    for chunk in out:
        ChatCompletionChunk.model_validate(chunk)
    pieces = [call for chunk in out for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert len(pieces) > 4 and all("index" in piece for piece in pieces)
    for index, name, arguments in [(0, "weather", {"town": "Verona"}), (1, "clock", {})]:
        mine = [piece for piece in pieces if piece["index"] == index]
        assert (
            mine[0]["function"]["name"] == name and mine[0]["type"] == "function" and mine[0]["id"]
        )
        assert all("id" not in piece and "name" not in piece["function"] for piece in mine[1:])
        assert json.loads("".join(piece["function"]["arguments"] for piece in mine)) == arguments
    assert [chunk["choices"][0]["finish_reason"] for chunk in out][-2:] == [None, "tool_calls"]


def test_built_in_tools_come_after_the_python_tag():
    order = chat(tools=[{"type": "brave_search"}])
    tag = TOKENIZER.special_id("<|python_tag|>")
    text = 'brave_search.call(query="Verona")'
    choice = message(order, [delta(order, "", [tag]), *written(order, text)])
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "brave_search",
        {"query": "Verona"},
    )


def test_other_text_is_left_as_it_is():
    order = chat(tools=[WEATHER])
    for text in [
        "No call.",
        '{"name": "other", "parameters": {}}',
        '{"name": "weather"',
        "[",
        "{}",
        "<function=weather>",
    ]:
        choice = message(order, written(order, text))
        assert (
            choice["message"] == {"role": "assistant", "content": text, "refusal": None}
            and choice["finish_reason"] == "stop"
        )
    order = chat()  # nobody asked for calls
    assert message(order, written(order, CALLS))["message"]["content"] == CALLS
    order = chat(tools=[WEATHER])  # cut short: the client hears that it is
    assert message(order, written(order, CALLS[:40], end="length"))["finish_reason"] == "length"


def test_calls_and_their_results_go_back_to_the_model():
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"town": "Verona"}'},
    }
    dialog = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Fair"},
    ]
    order = chat(messages=dialog, tools=[WEATHER])
    assert order.requests[0].prompt_ids == ChatFormat(TOKENIZER).encode_dialog(
        dialog, tools=[WEATHER]
    )
    assert "Verona" in TOKENIZER.decode(order.requests[0].prompt_ids)
    assert (
        refused(messages=[{"role": "user", "content": "x", "tool_calls": [call]}])["param"]
        == "messages[0].tool_calls"
    )
    assert (
        refused(messages=[{"role": "assistant", "tool_calls": [{"id": 1}]}])["param"] == "messages"
    )
    assert refused(messages=[{"role": "assistant", "tool_calls": "f"}])["param"] == "messages"
