"""How large a regex or a grammar becomes once its counted repetitions are written out: known from
its text, in linear time.

llguidance looks ahead along text that is forced. `(a?){30000}a{30000}`, 19 bytes, kept it busy for
minutes over one mask. The time was measured with Llama 3's vocabulary: about 0.1 s for a million of
`Size.work`, and for a{1000000}, a node a character, 1.4 s and 340 MB. Repetitions in a JSON schema
(maxLength, minItems) force nothing, cost nothing up to 10**9, and are not limited.

The scanners follow the syntax of Rust's regex crate and of llguidance's Lark. Where they are fooled
(by verbose mode, say), or where other things cost time, the limits of the process that compiles the
form (grammar_process) hold.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from llama_tp.arch.errors import UserError

MAX_NODES = 100_000  # of a regex or grammar with its counted repetitions written out
MAX_WORK = 5_000_000  # half a second of one core
MAX_DEPTH = 100  # of rules within rules, beyond which they are not followed
_CAP = 10**12  # sizes beyond are not told apart

_COUNT = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")
_GROUP = re.compile(r"\(\?(?:P?<[^>]{0,200}>|([a-zA-Z-]*)([:)]))")
_ESCAPE = re.compile(
    r"\\(?:[pP](?:\{[^}]{0,100}\}|.)|[xuU]\{[^}]{0,20}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^\\\[\](){}|*+?^$.]+")
_NESTED = re.compile(r"[\[\]\\]")
_LARK = re.compile(
    r"""
    (?P<blank>\s+ | //[^\n]* | \#[^\n]*) | (?P<string>"(?:[^"\\\n]|\\.)*"i?) |
    (?P<regex>/(?:[^/\\\n]|\\.)+/[imslux]*) | (?P<special><[^<>\s]*>) |
    (?P<data>%(?:json|regex)\s*(?=\{)) | (?P<directive>%\w+[^\n]*) | (?P<arrow>->\s*\w+) |
    (?P<count>\{\s*\d*\s*,?\s*\d*\s*\}|~\s*\d+(?:\s*\.\.\s*\d+)?) |
    (?P<range>\.\.) | (?P<name>[\w.]+) | (?P<sign>.)""",
    re.VERBOSE,
)
_HEAD = re.compile(
    r"^[ \t]*[?!]?(\w+)(?:\.-?\d+)?(?:\[[^\]\n]*\])?(?:::?\w*)?[ \t]*:", re.MULTILINE
)


class Size(NamedTuple):
    """nodes: characters and classes, repetitions written out. slack: those of them that may be left
    out or repeated, and branches beside the first. forced: an upper bound of the longest run of
    characters that leave no choice."""

    nodes: int = 0
    slack: int = 0
    forced: int = 0

    @property
    def work(self) -> int:
        """In proportion to the time of a look along forced text: its length times what is open on
        the way."""
        return self.forced * self.slack

    def then(self, other: "Size") -> "Size":
        return Size(*(min(a + b, _CAP) for a, b in zip(self, other)))

    def times(self, low: int, high: int | None) -> "Size":
        """Repeated `low` to `high` times, None for any number."""
        high = low + 1 if high is None else max(low, high)
        slack = self.slack * low + self.nodes * (high - low)
        return Size(
            *(min(n, _CAP) for n in (self.nodes * high, slack, self.forced * max(low, high > 0)))
        )


LITERAL, CLASS = Size(1, 0, 1), Size(1, 0, 0)


class _Expression:
    """Groups, alternatives and repetitions of whatever atoms, as they are read from left to
    right."""

    def __init__(self) -> None:
        self._groups: list[tuple[list[Size], Size]] = []
        self._branches: list[Size] = []
        self._before, self._last = Size(), Size()  # of this branch: all but the last atom, and that

    def atom(self, size: Size) -> None:
        self._before, self._last = self._before.then(self._last), size

    def text(self, n: int) -> None:
        """n characters, each an atom."""
        self.atom(Size(n - 1, 0, n - 1))
        self.atom(LITERAL)

    def repeat(self, low: int, high: int | None) -> None:
        self._last = self._last.times(low, high)

    def alternative(self) -> None:
        self._branches.append(self._before.then(self._last))
        self._before = self._last = Size()

    def open(self) -> None:
        self._groups.append((self._branches, self._before.then(self._last)))
        self._branches, self._before, self._last = [], Size(), Size()

    def close(self) -> None:
        if self._groups:
            size = self._size()
            self._branches, self._before = self._groups.pop()
            self._last = size

    def end(self) -> Size:
        while self._groups:
            self.close()
        return self._size()

    def _size(self) -> Size:
        self.alternative()
        nodes, slack, forced = zip(*self._branches)
        n_more = len(nodes) - 1  # of many branches a text follows one: choices are not their sum
        return Size(max(nodes) + n_more, max(slack) + n_more, max(forced))


def regex_size(pattern: str) -> Size:
    """Of a regex in Rust's syntax. What is no regex has some size, too."""
    expression, at = _Expression(), 0
    while at < len(pattern):
        char, end = pattern[at], at + 1
        if found := _PLAIN.match(pattern, at):
            end = found.end()
            expression.text(end - at)
        elif char == "\\" and (found := _ESCAPE.match(pattern, at)):
            end = found.end()
            expression.atom(_escape(found[0]))
        elif char == "[":
            end = _end_of_class(pattern, at)
            expression.atom(LITERAL if len(set(pattern[at + 1 : end - 1])) == 1 else CLASS)
        elif char == "(":
            found = _GROUP.match(pattern, at)
            end = found.end() if found else end
            if not found or found[2] != ")":  # (?i) is a flag and no group
                expression.open()
        elif char == "{" and (found := _COUNT.match(pattern, at)) and (found[1] or found[3]):
            end = found.end()
            expression.repeat(*_count(*found.groups()))
        elif char in _SIGNS:
            _SIGNS[char](expression)
        elif char not in "^$":
            expression.atom(CLASS if char == "." else LITERAL)
        at = end
    return expression.end()


_SIGNS: dict[str, Callable[[_Expression], None]] = {
    "(": _Expression.open,
    ")": _Expression.close,
    "|": _Expression.alternative,
    "*": lambda e: e.repeat(0, None),
    "+": lambda e: e.repeat(1, None),
    "?": lambda e: e.repeat(0, 1),
}


def _escape(text: str) -> Size:
    return Size() if text[1] in "bBAz" else CLASS if text[1] in "dDwWsSpP" else LITERAL


def _end_of_class(pattern: str, at: int) -> int:
    """Behind the ] that closes the class that begins at `at`; classes may lie in classes."""
    depth, place = 0, at
    while found := _NESTED.search(pattern, place):
        place = found.end()
        if found[0] == "\\":
            place += 1
        elif found[0] == "]":
            depth -= 1
            if not depth:
                return place
        else:
            depth += 1
            place += pattern.startswith("^", place)
            place += pattern.startswith("]", place)  # the first one is a character
    return len(pattern)


def _count(low: str, comma: str, high: str) -> tuple[int, int | None]:
    first = _number(low)
    return first, _number(high) if high else None if comma else first


def _number(digits: str) -> int:
    return int(digits[:13]) if digits else 0


def lark_size(grammar: str) -> Size:
    """Of a grammar's largest rule, the rules and terminals that it names written out."""
    heads = list(_HEAD.finditer(grammar))
    ends = [head.start() for head in heads[1:]] + [len(grammar)]
    bodies = {head[1]: grammar[head.end() : end] for head, end in zip(heads, ends)}
    known: dict[str, Size] = {}

    def size_of(name: str, depth: int) -> Size:
        if name not in known:
            known[name] = LITERAL  # while it is looked at: one that names itself
            known[name] = _rule_size(
                bodies[name],
                lambda other: (
                    size_of(other, depth + 1) if other in bodies and depth < MAX_DEPTH else LITERAL
                ),
            )
        return known[name]

    sizes = [size_of(name, 0) for name in bodies]
    return Size(*(max(each) for each in zip(*sizes))) if sizes else Size()


def _rule_size(body: str, size_of_name: Callable[[str], Size]) -> Size:
    expression = _Expression()
    for kind, text in _lark_tokens(body):
        if kind == "string":
            n = max(len(text) - 2, 0)
            expression.atom(Size(n, 0, n))
        elif kind == "regex":
            expression.atom(regex_size(text[1 : text.rindex("/")]))
        elif kind == "name":
            expression.atom(size_of_name(text))
        elif kind in ("special", "data"):
            expression.atom(CLASS)
        elif kind == "count":
            expression.repeat(*_lark_count(text))
        elif kind == "sign" and text == "[":
            expression.open()
        elif kind == "sign" and text == "]":  # [x] is x or nothing
            expression.close()
            expression.repeat(0, 1)
        elif kind == "sign" and text in _SIGNS:
            _SIGNS[text](expression)
        elif kind == "sign" and text == "&":
            expression.alternative()
    return expression.end()


def _lark_count(text: str) -> tuple[int, int | None]:
    if found := _COUNT.match(text):
        return _count(*found.groups())
    low, _, high = text[1:].replace(" ", "").partition("..")
    return _number(low), _number(high or low)


def _lark_tokens(grammar: str) -> Iterator[tuple[str, str]]:
    """(kind, text); data is the text from %json or %regex to the end of the JSON behind it, if that
    is JSON."""
    at = 0
    while found := _LARK.match(grammar, at):
        end = found.end()
        if found.lastgroup == "data":
            try:
                end = json.JSONDecoder().raw_decode(grammar, end)[1]
            except (ValueError, RecursionError):
                end = len(grammar)
        yield str(found.lastgroup), grammar[at:end]  # each alternative has a name
        at = end


def check_size(what: str, size: Size) -> None:
    """Raises UserError for one that would be too much work."""
    if size.nodes > MAX_NODES:
        found, most = (
            f"written out, its repetitions have {_told(size.nodes)} parts",
            f"{MAX_NODES:,}",
        )
    elif size.work > MAX_WORK:
        found = (
            f"{_told(size.forced)} characters in a row may have to come, "
            f"with {_told(size.slack)} that may"
        )
        most = f"{MAX_WORK:,} for the product"
    else:
        return
    raise UserError(
        f"{what} repeats too much", found, f"the most is {most}: use smaller counts, or * and +"
    )


def _told(n: int) -> str:
    return f"{n:,}" if n < _CAP else f"over {_CAP:,}"


def check_regex(pattern: str) -> None:
    """Raises UserError for a regex that repeats too much."""
    check_size("the regex", regex_size(pattern))


def check_schema(schema: object) -> None:
    """Raises UserError for a JSON schema with a pattern that repeats too much, wherever it
    stands."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            patterns = part.get("patternProperties")
            for pattern in (
                part.get("pattern"),
                *(patterns if isinstance(patterns, Mapping) else ()),
            ):
                if isinstance(pattern, str):
                    check_size("a pattern of the JSON schema", regex_size(pattern))
            left += part.values()
        elif isinstance(part, list | tuple):
            left += part


def checked_lark(grammar: str, json_options: Mapping[str, Any]) -> str:
    """The grammar, whose %json parts get these options of llguidance where they have none. Raises
    UserError for one that repeats too much, in itself or in a part."""
    check_size("the grammar", lark_size(grammar))
    pieces = []
    for kind, text in _lark_tokens(grammar):
        if kind == "data" and text.startswith("%json"):
            try:
                schema = json.loads(text[len("%json") :])
                check_schema(schema)
                text = "%json " + json.dumps({"x-guidance": dict(json_options), **schema})
            except (ValueError, RecursionError):
                pass  # llguidance says what is wrong with it
        pieces.append(text)
    return "".join(pieces)
