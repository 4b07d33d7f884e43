"""How large forms become: against Rust's own idea of a regex's length, by way of llguidance, and
forms that were measured to hurt."""

import json
import random
import re
import time

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.text.grammar import json_schema, lark, regex
from llama_tp.text.repetition import MAX_NODES, lark_size, regex_size

# 19 bytes that kept llguidance 1.9.1 busy for minutes over one mask
STOPPER = "(a?){30000}a{30000}"


@pytest.mark.parametrize(
    "pattern",
    [
        STOPPER,
        "(a?){3000}a{3000}",
        "a{0,3000}a{3000}",
        "a{1000000}",
        "a{ 1000000 }",
        "a{,1000000}",
        "[a]{1000000}",
        "a{1000}{1000}",
        "a{1000000,}",
        r"\x{61}{1000000}",
        r"[\]]{1000000}",
        "(?:a{1000}){1000}",
        "(?P<n>(a?){30000})a{30000}",
        "((a{1,100}){1,100}){1,100}b",
        "b|" + STOPPER,
        f"({STOPPER})?",
        "(a|aa|aaa){3000}",
        "(a{1,3}){3000}",
        "a?" * 3000 + "a" * 3000,
        "é{1000000}",
        "(?i)a{1000000}",
        "a{99999999999999999999999}",
        "(" * 1000 + "a" + "){9}" * 1000,
    ],
)
def test_regexes_that_repeat_too_much(pattern):
    """In the three places where a regex can stand."""
    for make in (
        lambda: regex(pattern),
        lambda: json_schema({"items": {"anyOf": [{"type": "string", "pattern": f"^{pattern}$"}]}}),
        lambda: json_schema({"patternProperties": {pattern: {}}}),
        lambda: lark(f"start: X\nX: /{pattern}/"),
        lambda: lark(f"start: %json {json.dumps({'pattern': pattern})}"),
    ):
        with pytest.raises(UserError, match="repeats too much.*the most is.*smaller counts"):
            make()


@pytest.mark.parametrize(
    "grammar",
    [
        'start: ("a"?){30000} "a"{30000}',
        'start: y{3000} x{3000}\ny: x?\nx: "a"',
        'start: X\nX: "a"{1000000}',
        'start: X~1000000\nX: "ab"',
        'start: X~1..1000000\nX: "ab"',
        'start: x{1000}\nx: y{1000}\ny: "a"',
        'start: x\nx: (y | "b"){1000}\ny: (z "," ){1000}\nz: /a/',
        'start: [x]{3000} x{3000}\nx: "a"',
        'start: X\nX.2: "a"{1000000}',
        'start: A\nA[temperature=1]: "a"{1000000}',
        'start: "{" // no comment {2}\n  | "a"{1000000}',
        "start: " + " ".join(["A?"] * 3000 + ["A"] * 3000) + '\nA: "a"',
    ],
)
def test_grammars_that_repeat_too_much(grammar):
    with pytest.raises(UserError, match="the grammar repeats too much.*the most is"):
        lark(grammar)


@pytest.mark.parametrize(
    "make",
    [
        lambda: regex("[0-9]{3}-[0-9]{2}"),
        lambda: regex(r"[\s\S]{0,100000}"),
        lambda: regex(r"(\w{1,20} ){0,2000}\."),
        lambda: regex(r"(\w+ ){400}"),
        lambda: regex("a" * 60_000),
        lambda: regex("|".join("a" * i + "b" for i in range(300))),
        lambda: regex("|".join(["word" * 10] * 1000)),
        lambda: regex("b|" + "word" * 5000),
        lambda: regex("-{80}"),
        lambda: regex("(.*a.{300})"),
        lambda: regex(r"[^{}]{5}\{30000\}[{]{3}"),
        lambda: json_schema({"type": "string", "maxLength": 10**9}),
        lambda: json_schema({"type": "array", "minItems": 10**6, "maxItems": 10**9}),
        lambda: json_schema({"properties": {"pattern": {"type": "string"}}}),
        lambda: json_schema({"pattern": 3, "patternProperties": [1]}),
        lambda: json_schema({"enum": [STOPPER]}),
        lambda: lark(f'start: "{STOPPER}" // {STOPPER}'),
        lambda: lark('start: start "a" | "b"'),
        lambda: lark('start: call ("; " call){0,31}\ncall: "f" %json {"type": "object"}'),
        lambda: lark('start: a ~"b"\na: /b/'),
        lambda: lark('start: "' + "a" * 60_000 + '"'),
        lambda: lark("\n".join(f"r{i}: r{i + 1}" for i in range(3000)) + "\nstart: r0"),
    ],
)
def test_what_costs_nothing_is_taken(make):
    make()


def test_sizes_are_those_of_the_text_written_out():
    """Drawn regexes, whose counted repetitions are written out by hand; the shortest text is one
    that Python's re matches."""
    draw = random.Random(1)

    def expression(depth: int) -> tuple[str, str, str]:
        """(regex, the same without counts, a shortest text)."""
        kind = draw.choice(
            ["text", "class", "both", "either", "times"] if depth else ["text", "class"]
        )
        if kind in ("text", "class"):
            return (
                (("a", "a", "a"), (r"\.", r"\.", "."), ("é", "é", "é"))[draw.randrange(3)]
                if kind == "text"
                else draw.choice(
                    [
                        ("[a-z]", "[a-z]", "k"),
                        (r"\d", r"\d", "4"),
                        ("[^]a]", "[^]a]", "x"),
                        ("[[a-c]x]", "[[a-c]x]", "x"),
                    ]
                )
            )
        one, two = expression(depth - 1), expression(depth - 1)
        if kind == "both":
            return one[0] + two[0], one[1] + two[1], one[2] + two[2]
        if kind == "either":
            return f"({one[0]}|{two[0]})", f"({one[1]}|{two[1]})", min(one[2], two[2], key=len)
        low, more = draw.randrange(3), draw.randrange(3)
        count = f"{{{low}}}" if not more else f"{{{low},{low + more}}}"
        return f"(?:{one[0]}){count}", f"(?:{one[1]})" * low + f"(?:{one[1]})?" * more, one[2] * low

    for _ in range(300):
        counted, written, shortest = expression(4)
        size = regex_size(counted)
        assert size[:2] == regex_size(written)[:2] and size.slack <= size.nodes
        if "|" not in counted:
            assert size.nodes - size.slack == len(shortest)
        if "[[" not in counted and "[^]" not in counted:
            assert re.fullmatch(counted, shortest)


def test_sizes_of_grammars():
    assert lark_size('start: x{3} "end"\nx: Y | "abc"\nY: /a{5}b?/').nodes == 3 * (6 + 1) + 3
    assert lark_size('start: "a"~3..5').slack == 2
    assert lark_size('start: "a"~3..5 B\nB: /[x-z]{4}/') == (5 + 4, 2, 3)
    assert lark_size("").nodes == 0 and lark_size("start start :::").nodes < MAX_NODES


@pytest.mark.parametrize(
    "text",
    [
        "(",
        ")",
        "[",
        "[^]",
        "\\",
        "\\p{",
        "{5}",
        "a{",
        "a{5",
        "(?",
        "(?P<",
        "(?i)",
        "*",
        "|",
        "x{2}{3}?+",
        "[[",
        "[a-",
        "\\x{",
    ],
)
def test_what_is_no_regex_has_some_size(text):
    assert (
        regex_size(text).nodes < 100
        and lark_size(text).nodes < 100
        and regex_size(text * 20_000).nodes >= 0
    )


@pytest.mark.parametrize(
    "size, begin, piece",
    [
        (regex_size, "a{", " "),
        (regex_size, "a{", "1"),
        (regex_size, "a{1 ,", " "),
        (regex_size, "", "{ 1 , "),
        (regex_size, "", "("),
        (regex_size, "(?", "a"),
        (regex_size, "", "(?<a"),
        (regex_size, "", "["),
        (regex_size, "", "\\p{"),
        (lark_size, "start: a{", " "),
        (lark_size, 'start: "', '\\"'),
        (lark_size, "start: /", "\\/"),
        (lark_size, "start: a~", "1"),
        (lark_size, "start: a~1", " "),
        (lark_size, "start: a ->", " "),
        (lark_size, "start: %json", " "),
        (lark_size, "", "a::"),
        (lark_size, "start: ", '%json {"a": '),
    ],
)
def test_the_time_to_read_a_form_is_in_proportion_to_its_length(size, begin, piece):
    """{ and 400 blanks took half a minute, with the server's lock held. Eight times as long: 8
    times the work, or 64 if squared."""

    def seconds(n: int) -> float:
        text = begin + piece * (n // len(piece))
        times = []
        for _ in range(3):
            since = time.thread_time()
            size(text)
            times.append(time.thread_time() - since)
        return min(times)

    short = 12 if begin.endswith("{") and piece == " " else 4000  # 96 blanks took 0.1 s
    assert seconds(8 * short) < 32 * seconds(short) + 0.02
