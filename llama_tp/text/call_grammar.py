"""The forms in which Llama 3 models call tools, as a grammar.

Each method reads one form from a Reader (see call_syntax): it returns when it has found it, and
rejects what can no longer become it. What it finds goes to `out`. Knows nothing of pieces and of
who drives it: see tool_calls.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llama_tp.text.call_syntax import (
    QUOTES,
    SPACE,
    Reader,
    Reading,
    Reject,
    escaped,
    object_in,
    python_calls,
    to_json,
)

CODE = "code_interpreter"
# the tools that Llama 3.1 knows without a schema
BUILT_IN = ("brave_search", "wolfram_alpha", CODE)
MAX_NAME = 128
_NAME = re.compile(r"[\w.:/\-]+")
_MEANS = {
    "name": "name",
    "function": "name",
    "parameters": "arguments",
    "arguments": "arguments",
    "type": "type",
    "id": "id",
}


@dataclass(frozen=True)
class CallDelta:
    """A piece of tool call number `index`. `id` and `name` come once, in its first piece; the
    `arguments` of all its pieces together are a JSON object, unless the model broke it or was cut
    short."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class _Enough(Exception):
    """A call too many: it and the rest of the text go nowhere."""


@dataclass
class _Found:
    """What a JSON object has said so far; `arguments` are JSON text, unless they have
    `streamed`."""

    said: set[str] = field(default_factory=set)
    name: str | None = None
    arguments: str | None = None
    streamed: bool = False


class CallGrammar:
    """The calls of one message.

    Args:
        parameters: name -> names of the parameters of the functions that can be called; None: any
            name can.
        parallel: False: a second call and all behind it are dropped.
        new_id: from a call's index to its id.

    Its characters come from `reader`. `out` grows by pieces of content (str) and of calls
    (CallDelta); `n_calls` counts the calls.
    """

    def __init__(
        self,
        parameters: Mapping[str, list[str]] | None,
        parallel: bool,
        new_id: Callable[[int], str],
    ):
        self.reader = Reader()
        self.out: list[str | CallDelta] = []
        self.n_calls = 0
        self._parameters, self._parallel, self._new_id = parameters, parallel, new_id
        self._unclosed = ""  # quotes that begin a query which the section does not end

    def section(self, tagged: bool) -> Reading:
        """A message, or the part of it behind a python tag: calls, then content or code."""
        r = self.reader
        n_before, self._unclosed = self.n_calls, ""
        yield
        try:
            while r.ch or r.held:
                called = self.n_calls > n_before
                try:
                    yield from r.space(SPACE + ";," if called else SPACE)
                    if called and not r.ch:
                        return  # nothing but separators behind the last call
                    yield from self._any_call()
                except Reject:
                    as_code = (
                        tagged
                        and self.n_calls == n_before
                        and self._callable(CODE)
                        and "".join(r.held).strip(SPACE)
                    )
                    yield from r.again()
                    yield from self._code() if as_code else self._content()
        except _Enough:
            while r.ch:
                r.held.clear()
                yield

    def _content(self) -> Reading:
        """Plain text, up to the end or behind a <function=> call."""
        r = self.reader
        while r.ch:
            try:
                if r.ch == "<":
                    yield from self._function_call()
                    return
            except Reject:  # content up to here; but another call may begin at this character
                self.out.extend(r.held[:-1] if r.ch else r.held)
                r.accept()
                continue
            self.out.append(r.ch)
            r.held.clear()
            yield

    def _code(self) -> Reading:
        """The rest, as the code interpreter's argument."""
        r = self.reader
        self._call(CODE, '{"code": "')
        while r.ch:
            self._argue(escaped(r.ch))
            yield
        self._argue('"}')

    def _any_call(self) -> Reading:
        r = self.reader
        if r.ch == "{":
            yield from self._json_call()
        elif r.ch == "[":
            yield from self._list()
        elif r.ch == "<":
            yield from self._function_call()
        else:
            yield from self._built_in()

    def _json_call(self, found: _Found | None = None) -> Reading:
        """{"name": "f", "parameters": {...}}, or the inner one of {"function": {...}}. An object
        that says anything else, or anything twice, is none; behind arguments that have streamed,
        what it says else is left as content."""
        r = self.reader
        inner, found = found is not None, found or _Found()
        yield from r.expect("{")
        yield from r.space()
        while r.ch != "}":
            key = yield from r.text()
            yield from r.space()
            yield from r.expect(":")
            yield from r.space()
            if key == "function" and r.ch == "{" and not inner:
                yield from self._json_call(found)
                if found.name is None:
                    raise Reject
            else:
                yield from self._said(_MEANS.get(key), found)
            yield from r.space()
            if r.ch == ",":
                yield
                yield from r.space()
            elif r.ch != "}":
                raise Reject
        if not inner and not found.streamed:
            self._whole_call(found)
        yield
        if not inner:
            r.accept()

    def _said(self, what: str | None, found: _Found) -> Reading:
        """The value of a key of a JSON call."""
        r = self.reader
        if what is None or what in found.said:
            raise Reject
        found.said.add(what)
        if what == "name":
            found.name = yield from r.text()
            if not self._callable(found.name):
                raise Reject
        elif what == "arguments" and r.ch == "{" and found.name is not None:
            found.streamed = True
            yield from self._streamed_arguments(found.name)
        else:
            pieces: list[str] = []
            yield from r.value(pieces.append)
            value = "".join(pieces)
            if what == "arguments":
                found.arguments = value
            elif (
                what == "type"
                and value != '"function"'
                or what == "id"
                and not value.startswith('"')
            ):
                raise Reject

    def _whole_call(self, found: _Found) -> None:
        """A JSON call whose arguments could not stream: they came before the name, as a string, as
        null, or not at all."""
        arguments = found.arguments
        if arguments == "null" or arguments is None and "type" in found.said:
            arguments = "{}"
        elif arguments and arguments.startswith('"'):
            arguments = object_in(arguments)
        if found.name is None or not arguments or not arguments.startswith("{"):
            raise Reject
        self._call(found.name, arguments)

    def _streamed_arguments(self, name: str) -> Reading:
        r = self.reader
        if not self._callable(name):
            raise Reject
        self._call(name)
        try:
            yield from r.value(self._argue)
        except Reject:  # broken or cut: it stays a call, with what the model wrote
            self._argue("".join(r.held))
            while r.ch:
                yield
                self._argue(r.ch)

    def _function_call(self) -> Reading:
        """<function=f>{...}</function>, of which the end may be missing."""
        r = self.reader
        yield from r.expect("<function=")
        name: list[str] = []
        while r.ch and r.ch not in "<>{}\n" and len(name) < MAX_NAME:
            name.append(r.ch)
            yield
        yield from r.expect(">")
        yield from r.space()
        if r.ch == "{":
            yield from self._streamed_arguments("".join(name))
            try:
                yield from r.space()
                yield from r.expect("</function>")
            except Reject:
                yield from r.again()
        else:
            yield from r.expect("</function>")
            if not self._callable("".join(name)):
                raise Reject
            self._call("".join(name), "{}")
        r.accept()

    def _list(self) -> Reading:
        """[{JSON call}, ...] or [f(x=1), ...]. The second is held until its end."""
        r = self.reader
        yield
        yield from r.space()
        if r.ch == "{":
            yield from self._json_call()
            yield from r.space()
            while r.ch == ",":
                yield
                yield from r.space()
                yield from self._json_call()
                yield from r.space()
            if r.ch != "]":
                raise Reject
        else:
            name = yield from r.name(more=".-")
            yield from r.space()
            if r.ch != "(" or not self._callable(name):
                raise Reject
            pieces = ["[", name]
            yield from r.python(["]"], pieces.append)
            for name, arguments in python_calls("".join(pieces), self._parameters_of):
                self._call(name, arguments)
        yield
        r.accept()

    def _built_in(self) -> Reading:
        """NAME.call(query="..."), the query as it is: Meta's form has no escapes.

        Yet a quote that no bracket follows belongs to it, and so does one behind a backslash, which
        models put there. A query that runs to the end of the section is no call, nor is any that
        the same text begins further on: read again for each, it would take quadratic time."""
        r = self.reader
        name = yield from r.name()
        yield from r.expect(".call(query=")
        if not r.ch or r.ch not in QUOTES or r.ch in self._unclosed or not self._callable(name):
            raise Reject
        quote, query = r.ch, []
        yield
        while True:
            if r.ch == quote:
                yield
                if r.ch == ")":
                    break
                query.append(quote)
            elif r.ch == "\\":
                yield
                if r.ch != quote:
                    query.append("\\")
                if r.ch and r.ch in quote + "\\":
                    query.append(r.ch)
                    yield
            elif r.ch:
                query.append(r.ch)
                yield
            else:
                self._unclosed += quote
                raise Reject
        self._call(name, to_json({"query": "".join(query)}))
        yield
        r.accept()

    def _callable(self, name: str | None) -> bool:
        return (
            name in self._parameters
            if self._parameters is not None
            else bool(name and len(name) <= MAX_NAME and _NAME.fullmatch(name))
        )

    def _parameters_of(self, name: str) -> list[str] | None:
        return (self._parameters or {}).get(name, []) if self._callable(name) else None

    def _call(self, name: str, arguments: str = "") -> None:
        """A call, whose arguments begin with these."""
        if self.n_calls and not self._parallel:
            raise _Enough
        self.out.append(CallDelta(self.n_calls, self._new_id(self.n_calls), name, arguments))
        self.n_calls += 1

    def _argue(self, text: str) -> None:
        """More arguments of the last call; all that is held is in them."""
        self.out.append(CallDelta(self.n_calls - 1, arguments=text))
        self.reader.held.clear()
