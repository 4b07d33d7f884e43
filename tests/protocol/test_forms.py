"""What clients ask of an answer's form, and what form it becomes: each held against texts that fit
and texts that do not."""

import json

import pytest

from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.fields import check_body
from llama_tp.protocol.forms import check_form
from llama_tp.protocol.order import Order, ServedModel, prepare
from llama_tp.text.grammar import Grammars
from llama_tp.text.grammar_pool import GrammarPool
from tests.protocol.served import TOKENIZER, USER

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llama_tp[serve]'")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
F = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
G = {"type": "function", "function": {"name": "g", "parameters": NOTHING}}
CALL_F, CALL_G = '{"name": "f", "parameters": {"a": 1}}', '{"name": "g", "parameters": {}}'
MODEL = ServedModel("demo", TOKENIZER, 4096, TOKENIZER.n_vocab)


def chat(**fields) -> Order:
    return prepare(check_body("chat", {"messages": USER} | fields), MODEL, "chatcmpl-1")


def completion(**fields) -> Order:
    return prepare(check_body("completion", {"prompt": "ROMEO:"} | fields), MODEL, "cmpl-1")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER)


@pytest.fixture(scope="module")
def pool() -> GrammarPool:
    pool = GrammarPool(TOKENIZER)
    yield pool
    pool.close()


def fits(order, text: str, grammars: Grammars) -> bool:
    """Whether the form lets the text be written and end there."""
    constraint = grammars.start(order.requests[0].params.form)
    for token in TOKENIZER.encode(text):
        words = constraint.mask()
        if not words[token >> 5] >> (token & 31) & 1:
            return False
        constraint.advance(token)
    return constraint.complete


@pytest.mark.parametrize(
    "fields, good, bad",
    [
        ({"response_format": {"type": "json_object"}}, ['{"x": [1]}', "{}"], ["[1]", "x", '{"x"']),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
                }
            },
            ['{"a": 5}'],
            ['{"a": "5"}', "{}"],
        ),
        # instructor's, huggingface_hub's for OpenAI's json_schema, TGI's own, whose schemas need
        # not say that they are of objects
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            ['{"a": 5}'],
            ['{"a": "5"}', "{}"],
        ),
        (
            {"response_format": {"type": "json_object", "value": SCHEMA}},
            ['{"a": 5}'],
            ['{"a": "5"}', "{}"],
        ),
        (
            {
                "response_format": {
                    "type": "json_object",
                    "schema": {"properties": {"a": {"type": "integer"}}},
                    "value": None,
                }
            },
            ['{"a": 5}', "{}"],
            ['{"a": "5"}', "5", "[1]"],
        ),
        (
            {
                "response_format": {
                    "type": "json_object",
                    "schema": {"$ref": "#/$defs/A", "$defs": {"A": SCHEMA}},
                }
            },
            ['{"a": 5}'],
            ["{}"],
        ),
        ({"response_format": {"type": "json_object", "schema": {}}}, ["{}"], ["5"]),
        ({"response_format": {"type": "json", "value": SCHEMA}}, ['{"a": 5}'], ["{}"]),
        ({"response_format": {"type": "json", "value": json.dumps(SCHEMA)}}, ['{"a": 5}'], ["{}"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            ['{"a": 5}'],
            ["{}"],
        ),
        (
            {"response_format": {"type": "json_schema", "value": {"name": "s", "schema": SCHEMA}}},
            ['{"a": 5}'],
            ["{}"],
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": None},
                }
            },
            ["{}"],
            ["5"],
        ),
        ({"response_format": {"type": "regex", "value": "a+"}}, ["aaa"], ["", "b"]),
        ({"structured_outputs": {"json": SCHEMA}}, ['{"a": 5}'], ["{}"]),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, ['{"a": 5}'], ["{}"]),
        ({"structured_outputs": {"json_object": True}}, ["{}"], ["5"]),
        (
            {"structured_outputs": {"choice": ["a.b", "c_[d]", "é f"]}},
            ["a.b", "c_[d]", "é f"],
            ["axb", "a.bc", "c_d"],
        ),
        ({"structured_outputs": {"regex": "a+"}}, ["aaa"], ["", "b"]),
        ({"regex": "[0-9]{2}"}, ["42"], ["4", "423"]),
        ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, ["xy"], ["x"]),
        ({"grammar": 'start: "x"+'}, ["xxx"], ["y"]),
    ],
)
def test_forms_of_both_routes(fields, good, bad, grammars):
    for order in (chat(**fields), completion(**fields)):
        assert order.form_field == next(iter(fields))
        assert all(fits(order, text, grammars) for text in good) and not any(
            fits(order, text, grammars) for text in bad
        )


@pytest.mark.parametrize(
    "fields, good, bad",
    [
        (
            {"tool_choice": "required"},
            [CALL_F, CALL_G, f"{CALL_F}; {CALL_G}"],
            ["no", '{"name": "f", "parameters": {}}'],
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            [CALL_F],
            [f"{CALL_F}; {CALL_G}"],
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            [CALL_G],
            [CALL_F, f"{CALL_G}; {CALL_G}"],
        ),
        ({}, [CALL_F, "As you like it.", ""], ['{"name": "f", "parameters": {}}', '{"a": 1}']),
    ],
)
def test_calls_that_must_be_or_must_be_right(fields, good, bad, grammars):
    order = chat(tools=[F, G], **fields)
    assert all(fits(order, text, grammars) for text in good) and not any(
        fits(order, text, grammars) for text in bad
    )


def test_nothing_asked_is_nothing_demanded():
    for fields in (
        {},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": None}},
        {"tools": [G]},
    ):
        assert chat(**fields).requests[0].params.form is None and chat(**fields).form_field == ""


@pytest.mark.parametrize(
    "fields, param",
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": 5, "schema": SCHEMA},
                }
            },
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "odd": 1}}},
            "response_format.json_schema.odd",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": [1]},
                }
            },
            "response_format",
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA, "value": SCHEMA}},
            "response_format.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": [1]}}, "response_format"),
        ({"response_format": {"type": "json_object", "value": "{"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_object",
                    "json_schema": {"name": "s", "schema": SCHEMA},
                }
            },
            "response_format.json_schema",
        ),
        ({"response_format": {"type": "json_object", "odd": 1}}, "response_format.odd"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": SCHEMA},
                    "strict": True,
                }
            },
            "response_format.strict",
        ),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "response_format.schema"),
        ({"response_format": {"type": "json"}}, "response_format.value"),
        ({"response_format": {"type": "regex"}}, "response_format.value"),
        ({"response_format": {"type": "regex", "value": 5}}, "response_format"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"regex": ""}, "regex"),
        ({"regex": "a" * 70_000}, "regex"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        ({"regex": "a", "ignore_eos": True}, None),
        ({"tools": [F], "regex": "a"}, "tools"),
    ],
)
def test_what_is_wrong_is_named(fields, param):
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.status == 400 and caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "("},
        {"grammar": "start: nothing"},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "nonsense"}},
            }
        },
        {"regex": ".*" * 3000},
    ],
)
def test_what_cannot_be_followed_is_said_when_it_is_tried(fields, pool):
    order = chat(**fields)
    with pytest.raises(RequestError) as caught:
        check_form(order.form_field, order.requests[0].params.form, pool)
    assert (
        caught.value.status == 400
        and caught.value.param == next(iter(fields))
        and json.dumps(caught.value.found)
    )
