"""Chat ids against llama-models' ChatFormat, and what malformed dialogs are told."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.text.chat_format import TOOL_PROMPT, ChatFormat, call_text, with_tools
from llama_tp.text.tool_calls import parse
from tests.examples import examples
from tests.text.texts import SPECIAL

CONTENTS = st.text(max_size=30) | st.sampled_from(
    ["", "\n", "  padded  ", "\n\nnewlines first", SPECIAL]
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
DIALOGS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}), max_size=5)


@pytest.fixture(scope="session")
def meta_chat(meta_oracle):
    from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat

    return MetaChatFormat(meta_oracle)


def metas_ids(meta_chat, dialog):
    from llama_models.datatypes import RawMessage

    return meta_chat.encode_dialog_prompt([RawMessage(**message) for message in dialog]).tokens


@settings(max_examples=examples(200), deadline=None)
@given(dialog=DIALOGS)
def test_ids_equal_llama_models(dialog, meta, meta_chat):
    assert ChatFormat(meta).encode_dialog(dialog) == metas_ids(meta_chat, dialog)


@settings(max_examples=examples(200), deadline=None)
@given(dialog=DIALOGS)
def test_stripped_ids_are_those_of_stripped_content(dialog, meta, meta_chat):
    bare = [{**message, "content": message["content"].strip()} for message in dialog]
    assert ChatFormat(meta).encode_dialog(dialog, strip=True) == metas_ids(meta_chat, bare)


def test_known_ids(meta):
    """llama3's own test vectors: the layout spelled out id by id."""
    chat = ChatFormat(meta)
    assert chat.encode_header("user") == [128006, 882, 128007, 271]
    message = {"role": "user", "content": " This is a test sentence. "}
    header, body = [128006, 882, 128007, 271], [2028, 374, 264, 1296, 11914, 13]
    assert chat.encode_message(message, strip=True) == [*header, *body, 128009]
    assert chat.encode_message(message) == [*header, *meta.encode(message["content"]), 128009]
    assert chat.encode_dialog([message], strip=True) == [
        128000,
        *header,
        *body,
        128009,
        128006,
        78191,
        128007,
        271,
    ]
    assert chat.encode_dialog([message], strip=True, add_generation_prompt=False) == [
        128000,
        *header,
        *body,
        128009,
    ]


def test_works_on_a_tiny_tokenizer(tiny):
    chat, n = ChatFormat(tiny), tiny.n_vocab - 256
    ids = chat.encode_dialog([{"role": "ipython", "content": SPECIAL}])
    assert ids == [
        n,
        n + 6,
        *tiny.encode("ipython"),
        n + 7,
        *tiny.encode("\n\n"),
        *tiny.encode(SPECIAL),
        n + 9,
        n + 6,
        *tiny.encode("assistant"),
        n + 7,
        *tiny.encode("\n\n"),
    ]
    assert ids == chat.encode_dialog([{"role": "tool", "content": SPECIAL}])


@pytest.mark.parametrize(
    "dialog, says",
    [
        ([{"role": "admin", "content": ""}], "unknown role.*'admin'.*system, user"),
        ([{"role": ["user"], "content": ""}], "unknown role"),
        ([{"role": "user"}], "exactly a role and a content.*the keys .'role'"),
        (
            [{"role": "user", "content": "", "tool_calls": []}],
            "exactly a role and a content.*tool_calls",
        ),
        ([{}], "the keys .."),
        (["hello"], "exactly a role and a content.*'hello'"),
        ([{"role": "user", "content": None}], "must be a text.*NoneType in a message of 'user'"),
        ([{"role": "user", "content": ["a"]}], "must be a text.*list"),
        ("hello", "must be a list of messages.*str"),
        ({"role": "user", "content": ""}, "must be a list of messages.*dict"),
    ],
)
def test_malformed(dialog, says, tiny):
    with pytest.raises(UserError, match=says):
        ChatFormat(tiny).encode_dialog(dialog)


# Tools

FUNCTION = {
    "type": "function",
    "function": {
        "name": "trending_songs",
        "description": "Songs that trend",
        "parameters": {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "required": ["n"],
        },
    },
}


def openai_call(name, arguments):
    return {
        "id": "call_1",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    }


VALUES = st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(max_size=8)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUES | st.lists(VALUES, max_size=2), max_size=3)


@settings(max_examples=examples(200), deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "get_weather"]), ARGUMENTS), min_size=1, max_size=3
    ),
    content=CONTENTS,
    result=CONTENTS,
)
def test_calls_and_results_as_llama_models_writes_them(calls, content, result, meta, meta_chat):
    from llama_models.datatypes import RawMessage, ToolCall

    ours = [
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [openai_call(*call) for call in calls],
        },
        {"role": "tool", "content": result, "tool_call_id": "call_1"},
    ]
    theirs = [
        RawMessage(
            role="assistant",
            content=content,
            tool_calls=[
                ToolCall(call_id="call_1", tool_name=name, arguments=arguments)
                for name, arguments in calls
            ],
        ),
        RawMessage(role="tool", content=result),
    ]
    assert ChatFormat(meta).encode_dialog(ours) == meta_chat.encode_dialog_prompt(theirs).tokens


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["brave_search", "wolfram_alpha", "code_interpreter"]),
    text=st.text(max_size=20)
    | st.sampled_from(['say "hi" \\ x', "print('<|eot_id|>')", '")', "\\"]),
)
def test_code_and_search_are_tagged_and_end_the_message_not_the_turn(name, text, meta, meta_chat):
    from llama_models.datatypes import RawMessage, StopReason, ToolCall

    chat, tag, eom, eot = ChatFormat(meta), 128010, 128008, 128009
    arguments = {"code" if name == "code_interpreter" else "query": text}
    ids = chat.encode_message(
        {"role": "assistant", "content": None, "tool_calls": [openai_call(name, arguments)]}
    )
    at = len(chat.encode_header("assistant"))
    assert ids[at] == tag and ids[-1] == eom
    theirs = meta_chat.encode_dialog_prompt(
        [
            RawMessage(
                role="assistant",
                content="",
                stop_reason=StopReason.end_of_message,
                tool_calls=[ToolCall(call_id="call_1", tool_name=name, arguments=arguments)],
            )
        ]
    ).tokens
    # they tag code only; Meta's page tags both
    ours = [i for i in ids if i != tag or name == "code_interpreter"]
    assert [128000, *ours, *chat.encode_header("assistant")] == theirs
    ids = chat.encode_message(
        {"role": "assistant", "content": "", "tool_calls": [openai_call("f", {})]}
    )
    assert tag not in ids and ids[-1] == eot


@settings(max_examples=examples(200), deadline=None)
@given(
    name=st.sampled_from(["f", "brave_search", "wolfram_alpha", "code_interpreter"]),
    arguments=ARGUMENTS,
    text=st.text(max_size=20) | st.text("a\"'\\ )\n", max_size=12),
)
def test_what_is_written_as_a_call_is_read_as_that_call(name, arguments, text):
    """But for a search with \") or \\\" in it, or a \\ at its end: Meta's form has no way to say
    so."""
    text = re.sub(r'"+(?=\))', "", re.sub(r'\\+(?="|\Z)', "", text))
    for one in (arguments, {"query": text}, {"code": text + "print(1)"}):
        written = call_text(name, json.dumps(one))
        (call,) = parse(written, None, python_tag=name != "f").tool_calls
        assert (call.name, json.loads(call.arguments)) == (name, one)


def test_broken_arguments_are_handed_back_as_they_were():
    for broken in ('{"a": ', "[1]", "3", "nonsense", "[" * 100_000):
        assert json.loads(call_text("f", broken)) == {
            "type": "function",
            "name": "f",
            "parameters": broken,
        }
    assert json.loads(call_text("f", ""))["parameters"] == {}


def test_tools_are_offered_as_meta_does():
    question = {"role": "user", "content": "Use tools to get latest trending songs"}
    page = TOOL_PROMPT.format(functions=json.dumps(FUNCTION, indent=4))
    assert with_tools([question], [FUNCTION]) == [
        {"role": "system", "content": "Environment: ipython"},
        {"role": "user", "content": page},
        question,
    ]
    assert page.startswith("Answer the user's question by") and page.endswith(
        "\n}\n\nReturn function calls in JSON format."
    )
    system = {"role": "system", "content": "You are kind."}
    assert with_tools([system, question], [FUNCTION], "system") == [
        {"role": "system", "content": f"Environment: ipython\n\n{page}\n\nYou are kind."},
        question,
    ]
    built_in = [
        {"type": "wolfram_alpha"},
        {"type": "function", "function": {"name": "brave_search"}},
        {"type": "code_interpreter"},
    ]
    assert with_tools([system, question], built_in) == [
        {
            "role": "system",
            "content": "Environment: ipython\nTools: brave_search, wolfram_alpha\n\nYou are kind.",
        },
        question,
    ]
    assert with_tools([question], built_in[2:])[0]["content"] == "Environment: ipython"


def test_tools_change_nothing_but_the_messages(tiny):
    chat, dialog = ChatFormat(tiny), [{"role": "user", "content": "hello"}]
    assert chat.encode_dialog(dialog, tools=[FUNCTION]) == chat.encode_dialog(
        with_tools(dialog, [FUNCTION])
    )
    forged = {"type": "function", "function": {"name": SPECIAL, "description": SPECIAL}}
    specials = set(tiny.specials.values())
    # three messages, one header
    assert sum(i in specials for i in chat.encode_dialog(dialog, tools=[forged])) == 1 + 3 * 3 + 2


@pytest.mark.parametrize(
    "message, says",
    [
        ({"role": "assistant", "content": None}, "must be a text.*NoneType"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "must be a text.*NoneType"),
        (
            {"role": "assistant", "content": "", "tool_calls": {}},
            "tool_calls of a message must be a list.*dict",
        ),
        ({"role": "assistant", "content": "", "tool_calls": [3]}, "a name and arguments.*found 3"),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
            "a name and arguments",
        ),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "", "arguments": ""}}],
            },
            "a name and arguments",
        ),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, "must be a text"),
        ({"role": "system", "content": "", "tool_call_id": "1"}, "exactly a role and a content"),
    ],
)
def test_malformed_calls(message, says, tiny):
    with pytest.raises(UserError, match=says):
        ChatFormat(tiny).encode_dialog([message])


@pytest.mark.parametrize(
    "tool",
    [
        {},
        None,
        "f",
        {"type": "function"},
        {"type": "magic"},
        {"type": "function", "function": {}},
        {"type": "function", "function": {"name": 3}},
        {"type": ["a"]},
    ],
)
def test_malformed_tools(tool, tiny):
    with pytest.raises(UserError, match="a tool must be a function with a name"):
        ChatFormat(tiny).encode_dialog([{"role": "user", "content": ""}], tools=[tool])
