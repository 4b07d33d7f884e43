"""Token masks of forms: held against Python's re and json, and against forms that are made to
hurt."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.text import grammar
from llama_tp.text.grammar import Grammars, json_object, json_schema, lark, regex, tool_call
from llama_tp.text.tool_calls import parse
from tests.examples import examples

pytest.importorskip("llguidance")


@pytest.fixture(scope="session")
def grammars(tiny):
    return Grammars(tiny)


def allowed(constraint, n_vocab) -> set[int]:
    """Ids that a mask allows."""
    mask = constraint.mask()
    assert mask.dtype == np.uint32 and mask.shape == ((n_vocab + 31) // 32,)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[n_vocab:].any()
    return set(np.flatnonzero(bits).tolist())


def written(grammars, tokenizer, form, draw, most=400) -> str | None:
    """What a model of random mind writes under the mask; None if it was not done after `most`
    tokens."""
    constraint, ids = grammars.start(form), []
    while len(ids) < most:
        token = draw.choice(sorted(allowed(constraint, tokenizer.n_vocab)))
        if token in tokenizer.stop_ids:
            assert constraint.complete
            return tokenizer.decode(ids)
        constraint.advance(token)
        ids.append(token)


SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "n", "list"],
    "properties": {
        "kind": {"enum": ["a", 'b"c', "é"]},
        "n": {"type": "integer", "minimum": -5, "maximum": 70},
        "ok": {"type": "boolean"},
        "list": {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 3},
    },
}


@pytest.mark.parametrize("seed", range(15))
def test_whatever_is_sampled_has_the_form(seed, grammars, tiny):
    draw = random.Random(seed)
    text = written(grammars, tiny, json_schema(SCHEMA), draw)
    if text is not None:  # blanks without end, up to the limit
        found = json.loads(text)
        assert {"kind", "n", "list"} <= set(found) <= {"kind", "n", "ok", "list"} and found[
            "kind"
        ] in ("a", 'b"c', "é")
        assert (
            -5 <= found["n"] <= 70 and 1 <= len(found["list"]) <= 3 and set(found["list"]) == {None}
        )
    for pattern in (r"[ab]{2,5}", r"(yes|no|maybe)\.", r"[0-9]{3}-[0-9]{2}", r"é+x?"):
        text = written(grammars, tiny, regex(pattern), draw)
        assert text is None or re.fullmatch(pattern, text)
    calls = (
        parse(text, TOOLS).tool_calls
        if (text := written(grammars, tiny, tool_call(TOOLS, "f"), draw))
        else None
    )
    assert calls is None or all(
        call.name == "f" and isinstance(json.loads(call.arguments)["x"], int) for call in calls
    )


@settings(max_examples=examples(150), deadline=None)
@given(
    text=st.text("abéc ", max_size=6),
    pattern=st.sampled_from([r"[ab]*c", r"(a|bé)+", r"a?b?c?", r".{2,3}", r"ab|ac|abc", r" *é"]),
)
def test_a_text_is_complete_exactly_where_the_regex_matches(text, pattern, grammars, tiny):
    """Whatever tokens spell it. (A mask may allow less: bytes that are forced are to be spelled as
    the tokenizer does.)"""
    for ids in (
        tiny.encode(text),
        [i for byte in text.encode() for i in range(256) if tiny.token_bytes(i) == bytes([byte])],
    ):
        constraint = grammars.start(regex(pattern))
        try:
            for token in ids:
                constraint.advance(token)
        except UserError:
            assert not re.fullmatch(pattern, text)
            continue
        assert constraint.complete == bool(re.fullmatch(pattern, text))
        options = allowed(constraint, tiny.n_vocab)
        assert options and constraint.complete == (set(tiny.stop_ids) <= options) == bool(
            set(tiny.stop_ids) & options
        )
        for token in sorted(options)[:20]:
            constraint.fork().advance(token)  # raises if the mask has promised too much


@pytest.mark.parametrize(
    "value", [{}, {"a": [1, -2.5e3, None, True, 'é\n"'], "b": {"c": {}}}, {"": ""}]
)
def test_json_is_allowed_as_models_write_it(value, grammars, tiny):
    for separators in (None, (",", ":")):
        text = json.dumps(value, separators=separators, ensure_ascii=False)
        # advance raises if a token is not allowed
        constraint = grammars.start(json_object(), tiny.encode(text))
        assert constraint.complete


CALL = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "x-guidance": {"whitespace_flexible": True}},
        },
    }
]


@pytest.mark.parametrize(
    "form, head, tail",
    [
        (json_object(), "", ""),
        (json_schema({"type": "object"}), "", ""),
        (tool_call(CALL, "f"), '{"name": "f", "parameters": ', "}"),
        (
            json_schema(
                {
                    "type": "object",
                    "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": " +"},
                }
            ),
            "",
            "",
        ),
        (lark('start: "x" %json {"type": "object"} | %json {"type": "array"}'), "x", ""),
    ],
)
def test_json_is_compact_wherever_it_stands(form, head, tail, grammars, tiny):
    """At most one blank for each , and : so that a model cannot write blanks for ever."""

    def takes(text):
        try:
            return grammars.start(form, tiny.encode(head + text + tail)).complete
        except UserError:
            return False

    assert all(
        takes(text)
        for text in (
            "{}",
            '{"a":1,"b":[1,2]}',
            '{"a": 1, "b": [1, 2]}',
            '{"a": [{"b": []}, "c : , d  "]}',
        )
    )
    assert not any(
        takes(text)
        for text in (
            "{ }",
            '{"a":  1}',
            '{"a" : 1}',
            '{"a": 1 }',
            '{"a":\n1}',
            '{"a": [1,  2]}',
            '{"a": [ ]}',
            "{} ",
        )
    )


def test_a_random_mind_ends_compact_json_with_few_blanks(grammars, tiny):
    draw = random.Random(5)
    constraint, text = grammars.start(json_object()), b""
    for _ in range(300):
        options = [i for i in allowed(constraint, tiny.n_vocab) if tiny.token_bytes(i).isspace()]
        # a blank wherever one may come
        token = draw.choice(options or sorted(allowed(constraint, tiny.n_vocab)))
        if token in tiny.stop_ids:
            break
        constraint.advance(token)
        text += tiny.token_bytes(token)
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"?', b"", text)  # in strings blanks are the model's own
    assert b"  " not in outside and outside.count(b" ") <= outside.count(b",") + outside.count(b":")


def test_escapes_mean_characters(grammars, tiny):
    def takes(text):
        try:
            return grammars.start(json_object(), tiny.encode(text)).complete
        except UserError:
            return False

    assert (
        takes('{"a": "\\u00e9\\ud83d\\ude00\\n"}')
        and not takes('{"a": "\\ud800"}')
        and not takes('{"a": "\n"}')
    )


def test_special_tokens_are_no_text_and_stops_come_at_the_end(grammars, tiny):
    specials, stops = set(tiny.specials.values()), set(tiny.stop_ids)
    constraint = grammars.start(regex(r"(.|\n)*"))
    # may end at once, and write no other special
    assert allowed(constraint, tiny.n_vocab) & specials == stops
    constraint = grammars.start(regex("ab"))
    assert (
        not allowed(constraint, tiny.n_vocab) & specials
        and not constraint.complete
        and not constraint.ended
    )
    for token in tiny.encode("ab"):
        constraint.advance(token)
    assert constraint.complete and allowed(constraint, tiny.n_vocab) == stops and constraint.ended
    constraint.advance(min(stops))


def test_a_token_that_is_not_allowed_is_told(grammars, tiny):
    with pytest.raises(UserError, match="form of the answer is broken.*token"):
        grammars.start(json_object(), tiny.encode("hello"))


def test_forks_go_their_own_ways(grammars, tiny):
    one = grammars.start(regex("ab|cd"))
    two = one.fork()
    one.advance(tiny.encode("a")[0])
    two.advance(tiny.encode("c")[0])
    assert tiny.encode("b")[0] in allowed(one, tiny.n_vocab) and tiny.encode("d")[0] in allowed(
        two, tiny.n_vocab
    )


def test_resuming_from_ids_is_the_same_state(grammars, tiny):
    ids = tiny.encode('{"kind": "a", "n')
    one, two = grammars.start(json_schema(SCHEMA)), grammars.start(json_schema(SCHEMA), ids)
    for token in ids:
        one.advance(token)
    assert np.array_equal(one.mask(), two.mask())


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"$ref": "#/$defs/small"}},
                "required": ["x"],
                "additionalProperties": False,
                "$defs": {"small": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": "g"}},
    {"type": "brave_search"},
]


def test_calls_of_tools(grammars, tiny):
    def takes(form, text):
        try:
            return grammars.start(form, tiny.encode(text)).complete
        except UserError:
            return False

    f, g = '{"name": "f", "parameters": {"x": 3}}', '{"name": "g", "parameters": {"any": []}}'
    search = '{"name": "brave_search", "parameters": {"query": "gold"}}'
    any_one, named, single = (
        tool_call(TOOLS),
        tool_call(TOOLS, "f"),
        tool_call(TOOLS, parallel=False),
    )
    assert all(takes(any_one, text) for text in (f, g, search, f"{f}; {g}"))
    # it ends some time
    assert takes(any_one, "; ".join([f] * 32)) and not takes(any_one, "; ".join([f] * 33))
    assert (
        takes(named, f)
        and not takes(named, g)
        and takes(single, g)
        and not takes(single, f"{f}; {g}")
    )
    assert not any(
        takes(any_one, text)
        for text in (f.replace("3", "30"), f.replace("f", "h"), "text", f + "x", "{}")
    )
    assert [call.name for call in parse(f"{f}; {g}; {search}", TOOLS).tool_calls] == [
        "f",
        "g",
        "brave_search",
    ]
    quoted = [{"type": "function", "function": {"name": 'a"\\é|\n'}}]
    assert takes(tool_call(quoted), json.dumps({"name": 'a"\\é|\n', "parameters": {}}))
    untyped = tool_call(
        [
            {
                "type": "function",
                "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}},
            }
        ]
    )
    assert takes(untyped, '{"name": "f", "parameters": {"x": 1}}') and not takes(
        untyped, '{"name": "f", "parameters": true}'
    )
    for wrong in ((TOOLS, "nobody"), ([], None), (TOOLS * 50, None)):
        with pytest.raises(UserError, match="a tool must be called"):
            tool_call(*wrong)


def deep(n):
    schema = {"type": "string"}
    for _ in range(n):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: json_schema([]), "must be an object.*list"),
        (lambda: json_schema({"a": float("nan")}), "must be an object"),
        (lambda: json_schema({"a": object()}), "must be an object"),
        (lambda: json_schema(deep(3000)), "must be an object|too long"),
        (lambda: json_schema({"enum": ["x" * 100] * 1000}), "JSON schema is too long"),
        (lambda: regex(3), "regex must be a text"),
        (lambda: regex(""), "regex must be a text that is not empty.*found ''"),
        (lambda: lark("a" * 100_000), "grammar is too long"),
    ],
)
def test_forms_that_are_none(make, says):
    with pytest.raises(UserError, match=says):
        make()


@pytest.mark.parametrize(
    "form, says",
    [
        (regex("["), "unclosed character class"),
        (regex("(?=a)b"), "look-around"),
        (json_schema({"type": "magic"}), "magic"),
        (json_schema({"type": "string", "pattern": "["}), "regex parse error"),
        (json_schema(deep(200)), "recursion"),
        (json_schema({"$ref": "http://127.0.0.1:9/x"}), "retriev"),
        (json_schema({"$ref": "file:///etc/passwd"}), "retriev"),
        (json_schema({"not": {"type": "string"}}), "not"),
        (lark("start: x"), "unknown name"),
        (lark("nothing"), ""),
    ],
)
def test_forms_that_are_not_understood(form, says, grammars):
    with pytest.raises(UserError, match=f"not understood.*{says}"):
        grammars.start(form)


HOSTILE = {
    "nested repeats": regex(r"((a{1,99}){1,30}){1,30}b"),
    "redos": regex(r"(a+)+$"),
    "long": regex("a" * 60_000),
    "many states": regex(r"(.*a.{300})"),
    "alternatives": regex("|".join("a" * i + "b" for i in range(300))),
    "itself": json_schema({"$ref": "#"}),
    "enum": json_schema({"enum": [f"v{i}" for i in range(5000)]}),
    "properties": json_schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    ),
    "long string": json_schema({"type": "string", "minLength": 10**7, "maxLength": 10**8}),
    "many items": json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "multiples": json_schema(
        {"type": "integer", "multipleOf": 7919, "minimum": -(10**15), "maximum": 10**15}
    ),
    "products": json_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}": {"const": j}}} for j in range(10)]}
                for i in range(9)
            ]
        }
    ),
    "choices": json_schema(
        {
            "anyOf": [
                {"properties": {f"k{i}": {"type": "string"} for i in range(10)}} for _ in range(150)
            ]
        }
    ),
    "pattern": json_schema({"type": "string", "pattern": "^(a+)+$"}),
    "ambiguous": lark('start: s\ns: s s | s s s | "a" | ""'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_cost_bounded_time(name, grammars, tiny):
    try:  # a second or so; unbounded ones take hours, and pytest ends it
        constraint = grammars.start(HOSTILE[name])
        for token in tiny.encode('"' * (HOSTILE[name].kind == "json") + "a" * 100):
            if token not in allowed(constraint, tiny.n_vocab):
                break
            constraint.advance(token)
    except UserError as error:
        assert len(str(error)) < 1000


def test_llama_3s_vocabulary(meta):
    llama = Grammars(meta)
    for text in ('{"a": "日本語 😀 \\u00e9", "b": [1, 2]}', json.dumps({"key": "v" * 300})):
        assert llama.start(json_object(), meta.encode(text)).complete
    ids = allowed(llama.start(regex("yes|no")), meta.n_vocab)
    assert {meta.decode([i]) for i in ids} == {"y", "ye", "yes", "n", "no"}


def test_a_tokenizer_without_an_end_is_refused(tiny):
    class Endless:
        stop_ids = ()

    with pytest.raises(UserError, match="token that ends an answer"):
        Grammars(Endless())
    assert grammar.MAX_SOURCE == 65_536
