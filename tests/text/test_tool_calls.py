"""The parser of tool calls: every form, any text, any cutting into pieces; against llama-models and
against Python's own json."""

import itertools
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.text.call_grammar import CallDelta
from llama_tp.text.tool_calls import ToolCallParser, fold, parse
from tests.examples import examples

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }
    for name, properties in [
        ("f", {"x": {}, "y": {}}),
        ("get_weather", {"city": {}}),
        ("a.b-c", {}),
    ]
]
OFFERED = [*TOOLS, {"type": "brave_search"}, {"type": "code_interpreter"}]


def calls(answer):
    """[(name, arguments as an object)] of an answer, whose ids must be its own."""
    assert len({call.id for call in answer.tool_calls}) == len(answer.tool_calls)
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


# Every form, as models have been seen to write it: (text, behind a python tag?, calls, content
# beside them)
FORMS = [
    ('{"name": "f", "parameters": {"x": 1}}', 0, [("f", {"x": 1})], ""),
    (
        '{"type": "function", "name": "f", "parameters": {"x": {"a": [1, {"b": "}"}]}}}',
        1,
        [("f", {"x": {"a": [1, {"b": "}"}]}})],
        "",
    ),
    (
        '{\n    "type": "function",\n    "name": "f",\n    "parameters": {\n        "x": "10"\n    '
        "}\n}",
        1,
        [("f", {"x": "10"})],
        "",
    ),
    ('{"name": "f", "arguments": {}}', 0, [("f", {})], ""),
    ('{"function": "f", "parameters": {"x": null}}', 0, [("f", {"x": None})], ""),
    (
        '{"type": "function", "function": {"name": "f", "arguments": {"x": true}}}',
        0,
        [("f", {"x": True})],
        "",
    ),
    ('{"parameters": {"x": 1.5e3}, "name": "f"}', 0, [("f", {"x": 1500.0})], ""),
    ('{"name": "f", "arguments": "{\\"x\\": \\"it\'s\\"}"}', 0, [("f", {"x": "it's"})], ""),
    ('{"name": "f", "parameters": null}', 0, [("f", {})], ""),
    ('{"type": "function", "name": "f"}', 0, [("f", {})], ""),
    (
        '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 2}}',
        0,
        [("f", {"x": 1}), ("f", {"x": 2})],
        "",
    ),
    (
        '{"name": "f", "parameters": {"x": 1}}{"name": "f", "parameters": {}}\n',
        0,
        [("f", {"x": 1}), ("f", {})],
        "",
    ),
    (
        '[{"name": "f", "parameters": {"x": 1}},\n {"name": "get_weather", "parameters": {"city": '
        '"Köln"}}]',
        0,
        [("f", {"x": 1}), ("get_weather", {"city": "Köln"})],
        "",
    ),
    (
        "{'name': 'f', 'parameters': {'x': 'say \"hi\"', 'y': True}}",
        0,
        [("f", {"x": 'say "hi"', "y": True})],
        "",
    ),
    (
        '{"name": "f", "parameters": {"x": "two\nlines\tand \\d"}}',
        0,
        [("f", {"x": "two\nlines\tand \\d"})],
        "",
    ),
    ('{"name": "f", "parameters": {"x": 1}', 0, [("f", {"x": 1})], ""),
    ('{"name": "f", "parameters": {"x": 1}}\nThat is all.', 0, [("f", {"x": 1})], "\nThat is all."),
    (
        '<function=f>{"x": {"y": "it\'s {nested}\\n"}}</function>',
        0,
        [("f", {"x": {"y": "it's {nested}\n"}})],
        "",
    ),
    (
        '<function=getWeather>{"location":"New York","date":"2023-08-05"}',
        None,
        [("getWeather", {"location": "New York", "date": "2023-08-05"})],
        "",
    ),
    (
        'I look.\n<function=f>{"x": 1}</function><function=f></function> Done <3',
        0,
        [("f", {"x": 1}), ("f", {})],
        "I look.\n Done <3",
    ),
    ("<<function=f>{}</function>", 0, [("f", {})], "<"),
    (
        "[f(x=1, y=\"a\"), get_weather(city='Rome')]",
        0,
        [("f", {"x": 1, "y": "a"}), ("get_weather", {"city": "Rome"})],
        "",
    ),
    (
        "[f(1, y=[-1, (2.5, None)]), f(), a.b-c()]",
        0,
        [],
        "[f(1, y=[-1, (2.5, None)]), f(), a.b-c()]",
    ),
    (
        "[f(1, y=[-1, (2.5, None)]), f()]",
        0,
        [("f", {"x": 1, "y": [-1, [2.5, None]]}), ("f", {})],
        "",
    ),
    (
        '[f(x={"a": "it\'s", "b": true}, y="""q"q\n""")]',
        1,
        [("f", {"x": {"a": "it's", "b": True}, "y": 'q"q\n'})],
        "",
    ),
    ('[f(x="a\nb", y="\\d")]', 0, [("f", {"x": "a\nb", "y": "\\d"})], ""),
    (
        'brave_search.call(query="latest price of 1oz gold")',
        1,
        [("brave_search", {"query": "latest price of 1oz gold"})],
        "",
    ),
    (
        'brave_search.call(query="who said "hi\\" \\n")',
        1,
        [("brave_search", {"query": 'who said "hi" \\n'})],
        "",
    ),
    ("brave_search.call(query='a')", 0, [("brave_search", {"query": "a"})], ""),
    (
        "def g(n):\n    return 'a' * n  # \"\\\n\nprint(g(7))",
        1,
        [("code_interpreter", {"code": "def g(n):\n    return 'a' * n  # \"\\\n\nprint(g(7))"})],
        "",
    ),
    ("[x for x in y]", 1, [("code_interpreter", {"code": "[x for x in y]"})], ""),
    (
        'brave_search.call(query="a<function=f>{}</function>wolfram_alpha.call(query="b" '
        "c<function=f>{}</function>",
        0,
        [("f", {})] * 2,
        'brave_search.call(query="awolfram_alpha.call(query="b" c',
    ),
    (
        "brave_search.call(query=\"<function=f>{}</function>brave_search.call(query='b')",
        0,
        [("f", {}), ("brave_search", {"query": "b"})],
        'brave_search.call(query="',
    ),
    (' {"a": 1}', 1, [("code_interpreter", {"code": ' {"a": 1}'})], ""),
    (
        '{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}',
        0,
        [("f", {})],
        "",
    ),
    ('{"name": "f", "parameters": {}, "type": "function", "id": "1"}', 0, [("f", {})], ""),
    # The arguments have streamed before anybody knows: the call stays, and what is behind its
    # arguments is content.
    ('{"name": "f", "parameters": {"x": 1}, "note": "n"}', 0, [("f", {"x": 1})], ', "note": "n"}'),
    (
        '{"name": "f", "parameters": {"x": 1}, "arguments": {"y": 2}}!',
        0,
        [("f", {"x": 1})],
        ', "arguments": {"y": 2}}!',
    ),
    (
        '{"name": "f", "parameters": {"x": 1}, "name": "a.b-c"}',
        0,
        [("f", {"x": 1})],
        ', "name": "a.b-c"}',
    ),
    (
        '{"name": "f", "parameters": {"x": 1}, "type": "person"}',
        0,
        [("f", {"x": 1})],
        ', "type": "person"}',
    ),
    ('{"function": {"name": "f", "parameters": {}}, "note": 1}', 0, [("f", {})], '}, "note": 1}'),
    (
        '[{"name": "f", "parameters": {}}, {"name": "f", "note": 1}]',
        0,
        [("f", {})],
        ', {"name": "f", "note": 1}]',
    ),
]


@pytest.mark.parametrize("text, tag, found, content", FORMS)
def test_forms(text, tag, found, content):
    answer = parse(text, None if tag is None else OFFERED, bool(tag))
    assert (calls(answer), answer.content) == (found, content)


PLAIN = [
    "",
    " ",
    "\n",
    "Hello",
    "{",
    "[",
    "<",
    "{}",
    "[]",
    "[1, 2]",
    '{"a": 1}',
    '{"name": "f"',
    '{"name": "Bob", "parameters": {}}',
    '{"name": "nobody"}',
    '{"type": "function", "parameters": {}}',
    '{"name": "f", "parameters": 3}',
    '{"name": "f", "parameters": [1]}',
    '{"name": "f", "arguments": "no json"}',
    '{"name": "f", "arguments": "[1]"}',
    '{"name": 3, "parameters": {}}',
    '{"name": "f"}',
    '{"name": "f", "population": 3}',
    '{"name": "f", "type": "person"}',
    '{"note": "n", "name": "f", "parameters": {"x": 1}}',
    '{"name": "f", "name": "f", "parameters": {}}',
    '{"name": "f", "type": "person", "parameters": {}}',
    '{"name": "f", "id": {"a": 1}, "parameters": {}}',
    '{"function": {"name": "f", "note": 1, "parameters": {}}}',
    '{"function": {}, "name": "f", "parameters": {}}',
    '{"function": {"name": "f"}, "name": "f", "parameters": {}}',
    '{"parameters": {}, "arguments": {}, "name": "f"}',
    '{"function": {"function": {"name": "f", "parameters": {}}}}',
    '{"name": "f", "parameters": "", "note": 1}',
    '{"name": "f", "arguments": "{\\"x\\": 1, \\"x\\": 2}"}',
    "<function=",
    "<function=f",
    "<function=f>",
    "<function=f>x</function>",
    "<function=nobody>{}</function>",
    "[f(x=1)",
    "[f(x=1), 2]",
    "[f(x=g())]",
    "[f(x=1+1)]",
    "[f(*a)]",
    "[f(**a)]",
    "[f(x=1, x=2)]",
    "[f(1, x=2)]",
    "[f(1, 2, 3)]",
    "[f(x=b'a')]",
    "[f(x=1j)]",
    "[f(x=1e999)]",
    "[f(x={1: 2})]",
    "[f(x=f'{y}')]",
    "[f(x=)]",
    "[f(x='a)]",
    "[f(it's)]",
    "[f](http://x)",
    "[nobody(x=1)]",
    "[f(x=" + "[" * 200 + "]" * 200 + ")]",
    "[f(x=" + "-" * 100_000 + "1)]",
    "[f(x=" + "9" * 5000 + ")]",
    "[f(x=0x" + "f" * 5000 + ")]",
    "[f(x=" + "1+" * 50_000 + "1)]",
    "[f(x='\ud800')]",
    "[f(x=\x00)]",
    "[f(x=1) # now\n]",
    "[f(x={'a': 1, 'a': 2})]",
    "brave_search",
    "brave_search.call(query=",
    'brave_search.call(query="a"',
    'nobody.call(query="a")',
    "f.call(query=3)",
    "a <b> <3 <func <function> </function>",
    " ; , text",
    'wolfram_alpha.call(query="1")',
    '{"name": "f" "parameters": {}}',
]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_call_is_content_unchanged(text):
    answer = parse(text, OFFERED)
    assert answer.content == text and answer.tool_calls == []
    without_code = parse(text, [*TOOLS, {"type": "brave_search"}], python_tag=True)
    assert without_code.content == text and without_code.tool_calls == []


# Any text, and texts made of what calls are made of.
PIECES = st.sampled_from(
    [
        '{"name": "f", "parameters": ',
        '{"x": ',
        '{"name": ',
        '"f"',
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        '"',
        "'",
        "\\",
        "\\u12",
        ",",
        ":",
        ";",
        " ",
        "\n",
        "<function=f>",
        "</function>",
        "<",
        "[f(",
        "x=",
        "1",
        "true",
        "None",
        "-",
        "brave_search.call(query=",
        "code",
        "é",
        "\ud800",
        '{"name": "f", "parameters": {"x": 1}}',
        "f(x=1)",
        "[f(x=1)]",
        '"type": "function"',
        '"arguments": ',
        '"""',
        "\x00",
        "<function=",
    ]
)
TEXTS = st.text(max_size=60) | st.lists(PIECES, max_size=14).map("".join)
TOOL_SETS = st.sampled_from([None, [], TOOLS, OFFERED])


def deterministic(index):
    return f"call_{index}"


def fed(text, cuts, tools, tag, **options):
    """The deltas of `text` cut at `cuts`, with the tag at character `tag` (None: nowhere)."""
    parser, deltas = ToolCallParser(tools, new_id=deterministic, **options), []
    bounds = sorted(
        {0, len(text), *(cut % (len(text) + 1) for cut in cuts), *([] if tag is None else [tag])}
    )
    for start, end in zip(bounds, bounds[1:] or [0]):
        deltas += parser.push(text[start:end], python_tag=start == tag)
    if tag == len(text) and text:
        deltas += parser.push("", python_tag=True)
    return deltas + parser.finish()


@settings(max_examples=examples(600), deadline=None)
@given(
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200), max_size=8),
    tools=TOOL_SETS,
    tag=st.none() | st.integers(0, 60),
    parallel=st.booleans(),
)
def test_any_cutting_of_any_text_gives_the_same_message(text, cuts, tools, tag, parallel):
    tag = None if tag is None else tag % (len(text) + 1)
    whole = fold(fed(text, [], tools, tag, parallel=parallel))
    deltas = fed(text, cuts, tools, tag, parallel=parallel)
    assert fold(deltas) == whole == fold(fed(text, range(len(text)), tools, tag, parallel=parallel))
    assert "" not in deltas and len(whole.tool_calls) <= (99 if parallel else 1)
    begun = [delta for delta in deltas if isinstance(delta, CallDelta) and delta.name is not None]
    assert [delta.index for delta in begun] == list(range(len(begun)))  # in order, named once
    assert all(delta.id == f"call_{delta.index}" for delta in begun)
    if not whole.tool_calls:
        assert whole.content == text
    for call in whole.tool_calls:
        assert tools is None or call.name in (
            "f",
            "get_weather",
            "a.b-c",
            "brave_search",
            "code_interpreter",
        )


# Texts in which every word that is not of a call's own form is another: m0, m1, ...
WORDLESS = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ",",
        ":",
        ";",
        " ",
        "\n",
        "#",
        '"name": "f"',
        '"name": ',
        '"parameters": ',
        '"arguments": {',
        '"function": {',
        '"type": "function", ',
        '"id": "7", ',
        "<function=f>",
        "<function=",
        "</function>",
        "[f(",
        "f(",
        "x=",
        "*",
        '"',
        "'",
        '{"name": "f", "parameters": {',
        '{"name": "f", ',
        "brave_search.call(query=",
        '")',
        "\\",
        "MARK",
        '"MARK"',
        '"MARK": ',
        '"MARK": "MARK"',
        "MARK=",
        "'MARK'",
    ]
)
VALUES = st.deferred(
    lambda: st.sampled_from(['"MARK"', '"f"', "1", "null", '"function"']) | RECORDS
)
KEYS = st.sampled_from(["name", "function", "parameters", "arguments", "type", "MARK"])
RECORDS = st.lists(st.tuples(KEYS, VALUES), max_size=4).map(
    lambda items: "{" + ", ".join(f'"{key}": {value}' for key, value in items) + "}"
)
CALLED = st.sampled_from(
    ['{"name": "f", "parameters": {"MARK": "MARK"}', "{", "<function=f>{", "[f(MARK=1", ""]
)
MARKED = st.lists(WORDLESS | RECORDS | st.tuples(CALLED, RECORDS).map("".join), max_size=8).map(
    "".join
)


@settings(max_examples=examples(600), deadline=None)
@given(
    text=MARKED,
    cuts=st.lists(st.integers(0, 200), max_size=5),
    tools=TOOL_SETS,
    tag=st.none() | st.just(0),
)
def test_no_word_is_lost(text, cuts, tools, tag):
    numbers = itertools.count()
    text = re.sub("MARK", lambda _: f"m{next(numbers)}m", text)
    answer = fold(fed(text, cuts, tools, tag))
    kept = " ".join(
        [answer.content, *(f"{call.name} {call.arguments}" for call in answer.tool_calls)]
    )
    assert [word for word in re.findall(r"m\d+m", text) if word not in kept] == []
    if not answer.tool_calls:
        assert answer.content == text


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["f", "get_weather"]),
        st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=examples(300), deadline=None)
@given(
    wanted=CALLS,
    key=st.sampled_from(["parameters", "arguments"]),
    between=st.sampled_from(["", ";", "; ", ", ", "\n"]),
    ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
    tag=st.booleans(),
    form=st.sampled_from(["json", "list", "tag"]),
)
def test_what_is_written_as_calls_is_read_as_these_calls(
    wanted, key, between, ascii, indent, tag, form
):
    def dumps(value):
        return json.dumps(value, ensure_ascii=ascii, indent=indent)

    if form == "tag":
        text = between.join(
            f"<function={name}>{dumps(arguments)}</function>" for name, arguments in wanted
        )
    else:
        objects = [{"type": "function", "name": name, key: arguments} for name, arguments in wanted]
        text = dumps(objects) if form == "list" else between.join(map(dumps, objects))
    answer = parse(text, TOOLS, python_tag=tag)
    assert calls(answer) == wanted and answer.content == ""


WORD = st.from_regex(r"[a-z_]{1,5}", fullmatch=True).map("p_".__add__)
PYTHON_CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(WORD, JSON, max_size=3)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=examples(300), deadline=None)
@given(wanted=PYTHON_CALLS)
def test_python_lists_of_calls(wanted):
    text = ", ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
        for name, arguments in wanted
    )
    answer = parse(f"[{text}]", TOOLS)
    assert calls(answer) == wanted and answer.content == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "function", "name": "f", "parameters": {"n": "10", "genre": "all"}}',
        '{"name": "f", "parameters": {"a": {"b": 2}}}',
        '<function=trending_songs>{"n": 10}</function>',
        '[get_boiling_point(liquid_name="water", celcius=True)]',
        "[initialize()]",
        'brave_search.call(query="100th decimal of pi")',
        'brave_search.call(query="a\\\\b \\n c")',
        "print(1)\nprint('two')",
        "just text",
        "[1, 2]",
        '{"a": "b"}',
        "[f(1)]",
        "[see](there)",
    ],
)
@pytest.mark.parametrize("tag", [False, True])
def test_as_llama_models_reads_it(text, tag, meta_oracle):
    from llama_models.datatypes import BuiltinTool, StopReason
    from llama_models.llama3.chat_format import ChatFormat

    written = ("<|python_tag|>" if tag else "") + text
    message = ChatFormat(meta_oracle).decode_assistant_message_from_content(
        written, StopReason.end_of_turn
    )
    theirs = [
        (
            call.tool_name.value if isinstance(call.tool_name, BuiltinTool) else call.tool_name,
            call.arguments,
        )
        for call in message.tool_calls
    ]
    ours = parse(text, None, python_tag=tag)
    assert calls(ours) == theirs and ours.content == message.content


def test_arguments_stream_as_they_come():
    parser, told = ToolCallParser(OFFERED, new_id=deterministic), []
    for ch in '{"name": "f", "parameters": {"x": "abc"}}':
        told.append(parser.push(ch))
    first = next(i for i, deltas in enumerate(told) if deltas)
    assert (
        told[first] == [CallDelta(0, "call_0", "f", "{")]
        and first == len('{"name": "f", "parameters": {') - 1
    )
    assert [delta.arguments for deltas in told[first + 1 :] for delta in deltas] == list(
        '"x": "abc"}'
    )
    assert parser.finish() == []
    parser = ToolCallParser(OFFERED, new_id=deterministic)
    assert parser.push("print(", python_tag=True) == [
        CallDelta(0, "call_0", "code_interpreter", '{"code": "print(')
    ]
    assert parser.push('"') == [CallDelta(0, arguments='\\"')] and parser.finish() == [
        CallDelta(0, arguments='"}')
    ]


def test_content_is_held_no_longer_than_it_must():
    parser = ToolCallParser(OFFERED)
    assert parser.push("Hel") == [] and parser.push("lo, ") == ["Hello, "]
    assert (
        parser.push("a < b") == ["a < b"]
        and parser.push("<func") == []
        and parser.push("y") == ["<funcy"]
    )
    assert (
        ToolCallParser(OFFERED).push('{"a') == []
        and ToolCallParser(OFFERED).push('{"name": "nobody", "parameters": {') != []
    )


def test_broken_arguments_come_out_as_written():
    for written in (
        '{"x": 1',
        '{"x": "a\\',
        '{"x": 12',
        '{"x": 1 2}}',
        '{"x": \\}',
        "{x: 1}}",
        '{"x": "\\u12"}}',
        '{"x": tru',
    ):
        answer = parse('{"name": "f", "parameters": ' + written, TOOLS)
        assert [call.arguments for call in answer.tool_calls] == [written] and answer.content == ""


def test_a_tag_in_mid_text_ends_what_was_before_it():
    parser = ToolCallParser(OFFERED, new_id=deterministic)
    assert parser.push('{"name"') == []
    assert parser.push("1 + 1", python_tag=True) == [
        '{"name"',
        CallDelta(0, "call_0", "code_interpreter", '{"code": "1 + 1'),
    ]
    assert parser.push('{"name": "f", "parameters": {}}', python_tag=True) == [
        CallDelta(0, arguments='"}'),
        CallDelta(1, "call_1", "f", "{}"),
    ]
    assert parser.finish() == [] and parser.n_calls == 2


def test_not_parallel_means_one_call():
    text = '{"name": "f", "parameters": {"x": 1}}; {"name": "f", "parameters": {"x": 2}} and more'
    assert calls(parse(text, TOOLS, parallel=False)) == [("f", {"x": 1})]
    assert calls(parse("[f(1), f(2)]", TOOLS, parallel=False)) == [("f", {"x": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "{" * 40_000,
        "[" * 40_000,
        "<function=" * 4_000,
        '{"name": "f", "parameters": ' + '{"x":' * 6_000,
        "[f(x=" + "(" * 40_000,
        '"' * 40_000,
        '{"a": "' + "\\" * 40_000,
        '{"name": "f", "id": "' + "a" * 40_000,
        "[f(x='" + "\\'" * 20_000,
        "<" * 40_000,
        '{"name": "f", "parameters": {}};' * 1_200,
        "[f(x=" + "1," * 20_000,
        "[" + "f()," * 10_000,
        "brave_search.call(query=" + '"' * 40_000,
        'brave_search.call(query="<function=f>{}</function>' * 800,
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_time_is_linear_in_the_text(text, streamed):
    """Of 16 times the text: 16 times the work; were it quadratic, 256 times. Processor time, which
    other work does not lengthen."""

    def seconds(text: str) -> float:
        started = time.process_time()
        fold(fed(text, range(len(text)) if streamed else [], OFFERED, None))
        return time.process_time() - started

    few = min(seconds(text[: len(text) // 16]) for _ in range(3))
    assert seconds(text) < 64 * few + 0.5
