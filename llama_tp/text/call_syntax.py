"""JSON and Python literals as a model writes them, read character by character.

`Reader` is a source of characters for generators: `reader.ch` is the character at hand, a bare
`yield` asks for the next one, "" is the end. Its own generators read what stands at `ch` and stop
at the character behind it. They forgive what models do to JSON (single quotes, raw line breaks in a
string, True and None, unknown escapes) and give strict JSON. No recursion: nesting costs memory
only, time is linear in the text. `python_calls` reads a list of Python calls without running any.
Knows no tools.
"""

import ast
import json
import re
import warnings
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

SPACE, QUOTES = " \t\r\n", "\"'"
MAX_PYTHON_DEPTH = 50  # Python's own parser is recursive

_CLOSING = {"{": "}", "[": "]", "(": ")"}
_WORDS = {
    "true": "true",
    "false": "false",
    "null": "null",
    "True": "true",
    "False": "false",
    "None": "null",
}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


Reading = Generator[None, None, None]  # asks for a character with each yield
TextReading = Generator[None, None, str]  # the same, and returns what it has read


class Reject(Exception):
    """The text is not what it was read as."""


class Reader:
    """Characters in, one at a time. `held` is what was read since somebody last cleared it, `ch`
    included."""

    def __init__(self) -> None:
        self.ch = ""
        self.held: list[str] = []
        self.coming: deque[str] = deque()  # to be read before any new characters

    def advance(self) -> bool:
        """Takes the next of the coming characters, if there is one."""
        if self.coming:
            self.ch = self.coming.popleft()
            self.held.append(self.ch)
            return True
        return False

    def accept(self) -> None:
        """Lets go of what is held, all but the character at hand."""
        self.held[:] = [self.ch] if self.ch else []

    def again(self) -> Reading:
        """Reads what is held once more, from its first character on."""
        if self.held:
            self.coming.extendleft(reversed(self.held))
            self.held.clear()
            yield

    def space(self, which: str = SPACE) -> Reading:
        while self.ch and self.ch in which:
            yield

    def expect(self, text: str) -> Reading:
        for ch in text:
            if self.ch != ch:
                raise Reject
            yield

    def name(self, more: str = "") -> TextReading:
        """-> an ASCII identifier, in which the characters of `more` may stand too."""
        name: list[str] = []
        while (
            self.ch
            and self.ch.isascii()
            and (
                self.ch.isalpha()
                or self.ch == "_"
                or name
                and (self.ch.isdigit() or self.ch in more)
            )
        ):
            name.append(self.ch)
            yield
        if not name:
            raise Reject
        return "".join(name)

    def text(self) -> TextReading:
        """-> the meaning of a JSON string."""
        pieces: list[str] = []
        yield from self.string(pieces.append)
        meaning: str = json.loads("".join(pieces))
        return meaning

    def value(self, out: Callable[[str], None]) -> Reading:
        """A JSON value; its text goes to `out` as it is read, each piece as soon as its last
        character is at hand. `out` may clear `held`, which then tells what has been read and not
        yet given to `out`."""
        closers, want = [], "value"
        while True:
            ch = self.ch
            if ch and ch in SPACE:
                out(ch)
                yield
            elif ch in ("{", "[") and want in ("value", "value or end"):
                closers.append(_CLOSING[ch])
                want = "key or end" if ch == "{" else "value or end"
                out(ch)
                yield
            elif closers and ch == closers[-1] and want in ("key or end", "value or end", "comma"):
                closers.pop()
                want = "comma"
                out(ch)
                yield
            elif ch and ch in QUOTES and want != "comma" and want != "colon":
                want = "colon" if want.startswith("key") else "comma"
                yield from self.string(out)
            elif ch == ":" and want == "colon":
                want = "value"
                out(ch)
                yield
            elif closers and ch == "," and want == "comma":
                want = "key" if closers[-1] == "}" else "value"
                out(ch)
                yield
            elif want in ("value", "value or end"):
                want = "comma"
                yield from self._word(out)
            else:
                raise Reject
            if not closers and want == "comma":
                return

    def string(self, out: Callable[[str], None]) -> Reading:
        """A JSON string, in either quotes."""
        if not self.ch or self.ch not in QUOTES:
            raise Reject
        quote = self.ch
        out('"')
        yield
        while self.ch != quote:
            if not self.ch:
                raise Reject
            if self.ch == "\\":
                yield
                yield from self._escape(out)
            else:
                out(escaped(self.ch))
                yield
        out('"')
        yield

    def _escape(self, out: Callable[[str], None]) -> Reading:
        if not self.ch:
            raise Reject
        if self.ch == "u":
            digits = "u"
            while len(digits) < 4:
                yield
                if not self.ch or self.ch not in "0123456789abcdefABCDEF":
                    raise Reject
                digits += self.ch
            yield
            if not self.ch or self.ch not in "0123456789abcdefABCDEF":
                raise Reject
            out(f"\\{digits}{self.ch}")
        elif self.ch in '"\\/bfnrt':
            out("\\" + self.ch)
        else:  # \' is a quote; \d is a backslash and a d
            out(self.ch if self.ch == "'" else "\\\\" + escaped(self.ch))
        yield

    def _word(self, out: Callable[[str], None]) -> Reading:
        """A number, true, false or null."""
        word = []
        while self.ch and (self.ch.isalnum() or self.ch in "+-._"):
            word.append(self.ch)
            yield
        text = "".join(word)
        if not _NUMBER.fullmatch(text) and text not in _WORDS:
            raise Reject
        out(_WORDS.get(text, text))
        if self.ch and not self.held:  # unlike elsewhere, `ch` is not part of what was given
            self.held.append(self.ch)

    def python(self, closers: list[str], out: Callable[[str], None]) -> Reading:
        """Python text up to the last of `closers`, the brackets that are open, innermost last. Ends
        *on* that bracket. Comments are
        rejected: nobody would see them."""
        while True:
            if self.ch and self.ch in QUOTES:
                yield from self._python_string(out)
                continue
            out(self.ch)
            if self.ch and self.ch in "([{":
                closers.append(_CLOSING[self.ch])
            elif (
                not self.ch
                or self.ch == "#"
                or len(closers) > MAX_PYTHON_DEPTH
                or self.ch in ")]}"
                and closers.pop() != self.ch
            ):
                raise Reject
            if not closers:
                return
            yield

    def _python_string(self, out: Callable[[str], None]) -> Reading:
        quote, n_quotes, n_closing = self.ch, 0, 0
        while self.ch == quote and n_quotes < 3:
            n_quotes += 1
            out(quote)
            yield
        if n_quotes == 2:
            return
        while n_closing < n_quotes:
            if not self.ch:
                raise Reject
            n_closing = n_closing + 1 if self.ch == quote else 0
            if self.ch == "\\":
                out(self.ch)
                yield
            out("\\n" if self.ch == "\n" and n_quotes == 1 else self.ch)
            yield


def escaped(text: str) -> str:
    """`text` as it stands within the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def to_json(value: object) -> str:
    """JSON text that UTF-8 can hold. ValueError for what JSON cannot."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return (
        text
        if text.isascii() or not any("\ud800" <= ch <= "\udfff" for ch in text)
        else json.dumps(value, allow_nan=False)
    )


def object_in(string: str) -> str:
    """The JSON object, as text, that a JSON string holds as text. Reject if it holds none, or one
    that says a key twice."""
    try:
        found = json.loads(json.loads(string), object_pairs_hook=_unique)
        if isinstance(found, dict):
            return to_json(found)
    except (ValueError, RecursionError):
        raise Reject from None
    raise Reject


def _unique(items: list[tuple[str, object]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        raise ValueError("a key stands twice")
    return found


def python_calls(
    text: str, parameters_of: Callable[[str], list[str] | None]
) -> list[tuple[str, str]]:
    """(name, arguments as JSON) of each call in the text of a Python list. `parameters_of(name)`
    names a function's parameters in order, for arguments without a name; None if there is no such
    function. Reject for anything but calls with literal arguments."""
    try:
        with warnings.catch_warnings():
            # "\d" in a string warns, and under -W error would raise
            warnings.simplefilter("ignore")
            calls = ast.parse(text, mode="eval").body
        if isinstance(calls, ast.List):
            return [_python_call(call, parameters_of) for call in calls.elts]
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise Reject from None
    raise Reject


def _python_call(
    call: ast.expr, parameters_of: Callable[[str], list[str] | None]
) -> tuple[str, str]:
    if not isinstance(call, ast.Call):
        raise Reject
    name = ast.unparse(call.func)
    parameters = parameters_of(name)
    if parameters is None or len(call.args) > len(parameters):
        raise Reject
    arguments = dict(zip(parameters, call.args))
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise Reject
        arguments[keyword.arg] = keyword.value
    return name, to_json({key: _literal(value) for key, value in arguments.items()})


def _literal(node: ast.expr) -> object:
    """What a literal means in JSON."""
    if isinstance(node, ast.Constant) and (
        node.value is None or isinstance(node.value, (bool, int, float, str))
    ):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return json.loads(_WORDS[node.id])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(number, int | float) and not isinstance(number, bool):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        found = dict(zip(map(_key, node.keys), map(_literal, node.values), strict=True))
        if len(found) == len(node.keys):
            return found
    raise Reject


def _key(node: ast.expr | None) -> str:
    """The key of a JSON object; None stands for ** in Python."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Reject
