"""A model's text -> content and tool calls, piece by piece.

What Llama 3 models write, several in one message if need be:

    {"type": "function", "name": "f", "parameters": {...}}      JSON: also "function" for "name" (or around both) and "arguments"
                                                                for "parameters"; several in a row, with or without ; or ,
    [{"name": "f", "parameters": {...}}, ...]                   the same as a list
    <function=f>{...}</function>                                anywhere in a text
    [f(x=1, y="a"), g()]                                        a list of Python calls
    brave_search.call(query="...")                              a built-in tool
    anything else, after <|python_tag|>                         code for the code interpreter

The text goes character by character through a generator that reads like a grammar (`_section`, see call_syntax). What may still
turn out not to be a call is held; a `Reject` sends it through again as content or code. Hence any cutting of a text into pieces
gives the same message, in time linear in its length. A JSON or <function=> call is certain at the { of its arguments, and they
stream from there; if they are broken or cut short they come out as the model wrote them (OpenAI warns its callers of that). All
other text that is no call is content, unchanged.

Knows no tokens: who feeds it says where <|python_tag|> stood.
"""

import itertools
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_tp.text.call_syntax import QUOTES, SPACE, Reader, Reject, escaped, object_in, python_calls, to_json

CODE = "code_interpreter"
BUILT_IN = ("brave_search", "wolfram_alpha", CODE)      # the tools that Llama 3.1 knows without a schema
MAX_NAME = 128
_NAME = re.compile(r"[\w.:/\-]+")


@dataclass(frozen=True)
class CallDelta:
    """A piece of tool call number `index`. `id` and `name` come once, in its first piece; the `arguments` of all its pieces
    together are a JSON object, unless the model broke it or was cut short."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class ToolCall:
    """A whole call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass
class Answer:
    """What the deltas of one message add up to."""

    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: str | CallDelta) -> None:
        if isinstance(delta, str):
            self.content += delta
        elif delta.name is not None:
            self.tool_calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        else:
            self.tool_calls[delta.index].arguments += delta.arguments


def fold(deltas: Iterable[str | CallDelta]) -> Answer:
    """The message that a stream of deltas tells."""
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
    return answer


def parse(text: str, tools: Sequence[Mapping] | None = None, python_tag: bool = False, **options) -> Answer:
    """A whole message at once; `python_tag` if <|python_tag|> stood before it. Never raises."""
    parser = ToolCallParser(tools, **options)
    return fold([*parser.push(text, python_tag), *parser.finish()])


def random_id(index: int) -> str:
    """A call's id, shaped like OpenAI's."""
    return f"call_{uuid.uuid4().hex[:24]}"


def signature(tool: Mapping) -> tuple[str, list[str]]:
    """(name, names of the parameters in order) of a tool in OpenAI's shape, or in the short one of a built-in tool,
    {"type": "brave_search"}."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return str(tool.get("type")), ["query"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return str(function.get("name")), list(properties) if isinstance(properties, Mapping) else []


class _Enough(Exception):
    """A call too many: it and the rest of the text go nowhere."""


@dataclass
class _Found:
    """What a JSON object has said so far."""

    name: str | None = None
    arguments: str | None = None
    kind: str = ""
    streamed: bool = False


class ToolCallParser:
    """The parser of one message.

    Args:
        tools: those of the request, in OpenAI's shape or as {"type": "brave_search"}. Only these can be called: text that names
            others is content. None: any name can be.
        parallel: False ends the message at its second call (OpenAI's parallel_tool_calls).
        new_id: from a call's index to its id.

    A server feeds it each Delta of the engine by itself (merged ones hide where the tag stood):

        tag = tokenizer.specials.get("<|python_tag|>")
        for delta in deltas:
            out = parser.push(delta.text, python_tag=tag in delta.ids)
            if delta.finish_reason:
                out += parser.finish()

    The finish reason is "tool_calls" where the engine says "stop" and `n_calls` is not 0. Where it says "length", the last call's
    arguments may end anywhere. <|eom_id|> and <|eot_id|> end an answer and are no part of it.
    """

    def __init__(self, tools: Sequence[Mapping] | None = None, parallel: bool = True, new_id: Callable[[int], str] = random_id):
        self.n_calls = 0
        self._parameters = None if tools is None else dict(map(signature, tools))
        self._parallel, self._new_id = parallel, new_id
        self._reader, self._out = Reader(), []
        self._begin_section(tagged=False)

    def push(self, text: str, python_tag: bool = False) -> list[str | CallDelta]:
        """What has become certain with `text`: pieces of content (str) and of calls, in order. `python_tag` says that the
        tag came just before `text`. Never raises, whatever the text."""
        if python_tag:
            self._end_section()
            self._begin_section(tagged=True)
        self._reader.coming.extend(text)
        self._read()
        return self._take()

    def finish(self) -> list[str | CallDelta]:
        """What was held back, at the end of the message."""
        self._end_section()
        self._begin_section(tagged=False)
        return self._take()

    # ------------------------------------------------------------------------------------------------- driving the grammar

    def _begin_section(self, tagged: bool) -> None:
        self._reader.held.clear()
        self._grammar = self._section(self._reader, tagged)
        next(self._grammar)                             # up to its wish for a character

    def _read(self) -> None:
        while self._reader.advance():
            next(self._grammar)

    def _end_section(self) -> None:
        """Shows the end to the grammar until it returns; in between it may read again what it had held."""
        ended = False
        while not ended:
            self._read()
            self._reader.ch = ""
            ended = next(self._grammar, True)           # a bare yield is None

    def _take(self) -> list[str | CallDelta]:
        """The deltas since the last time, neighbours that continue each other joined."""
        joined: list[str | CallDelta] = []
        for index, group in itertools.groupby(self._out, key=lambda delta: None if isinstance(delta, str) else delta.index):
            pieces = list(group)
            joined.append("".join(pieces) if index is None else CallDelta(
                index, pieces[0].id, pieces[0].name, "".join(piece.arguments for piece in pieces)))
        self._out.clear()
        return joined

    # -------------------------------------------------------------------------------------------------------- what is found

    def _callable(self, name: str | None) -> bool:
        return name in self._parameters if self._parameters is not None else bool(
            name and len(name) <= MAX_NAME and _NAME.fullmatch(name))

    def _parameters_of(self, name: str) -> list[str] | None:
        return (self._parameters or {}).get(name, []) if self._callable(name) else None

    def _call(self, name: str, arguments: str = "") -> None:
        """A call, whose arguments begin with these."""
        if self.n_calls and not self._parallel:
            raise _Enough
        self._out.append(CallDelta(self.n_calls, self._new_id(self.n_calls), name, arguments))
        self.n_calls += 1

    def _argue(self, text: str) -> None:
        """More arguments of the last call; all that is held is in them."""
        self._out.append(CallDelta(self.n_calls - 1, arguments=text))
        self._reader.held.clear()

    # ---------------------------------------------------------------------------------------------------------- the grammar

    def _section(self, r: Reader, tagged: bool):
        """A message, or the part of it behind a python tag: calls, then content or code."""
        n_before = self.n_calls
        yield
        try:
            while r.ch or r.held:
                called = self.n_calls > n_before
                try:
                    yield from r.space(SPACE + ";," if called else SPACE)
                    if called and not r.ch:
                        return                          # nothing but separators behind the last call
                    yield from self._any_call(r)
                except Reject:
                    as_code = tagged and self.n_calls == n_before and self._callable(CODE) and "".join(r.held).strip()
                    yield from r.again()
                    yield from self._code(r) if as_code else self._content(r)
        except _Enough:
            while r.ch:
                r.held.clear()
                yield

    def _content(self, r: Reader):
        """Plain text, up to the end or behind a <function=> call."""
        while r.ch:
            try:
                if r.ch == "<":
                    yield from self._function_call(r)
                    return
            except Reject:                              # content up to here; but another call may begin at this character
                self._out.extend(r.held[:-1] if r.ch else r.held)
                r.accept()
                continue
            self._out.append(r.ch)
            r.held.clear()
            yield

    def _code(self, r: Reader):
        """The rest, as the code interpreter's argument."""
        self._call(CODE, '{"code": "')
        while r.ch:
            self._argue(escaped(r.ch))
            yield
        self._argue('"}')

    def _any_call(self, r: Reader):
        if r.ch == "{":
            yield from self._json_call(r)
        elif r.ch == "[":
            yield from self._list(r)
        elif r.ch == "<":
            yield from self._function_call(r)
        else:
            yield from self._built_in(r)

    def _json_call(self, r: Reader, found: _Found | None = None):
        """{"name": "f", "parameters": {...}}, or the inner one of {"function": {...}}."""
        inner, found = found is not None, found or _Found()
        yield from r.expect("{")
        yield from r.space()
        while r.ch != "}":
            key = yield from r.text()
            yield from r.space()
            yield from r.expect(":")
            yield from r.space()
            if key in ("name", "function") and r.ch and r.ch in QUOTES:
                found.name = yield from r.text()
            elif key == "function" and r.ch == "{" and not inner:
                yield from self._json_call(r, found)
            elif key in ("parameters", "arguments") and r.ch == "{" and found.name is not None and not found.streamed:
                found.streamed = True
                yield from self._streamed_arguments(r, found.name)
            else:
                pieces: list[str] = []
                yield from r.value(pieces.append)
                if key in ("parameters", "arguments"):
                    found.arguments = "".join(pieces)
                elif key == "type":
                    found.kind = "".join(pieces)
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

    def _whole_call(self, found: _Found) -> None:
        """A JSON call whose arguments could not stream: they came before the name, as a string, or not at all."""
        arguments = found.arguments or "null"
        if arguments == "null" and (self._parameters is not None or found.kind == '"function"'):
            arguments = "{}"
        elif arguments.startswith('"'):
            arguments = object_in(arguments)
        if not arguments.startswith("{") or not self._callable(found.name):
            raise Reject
        self._call(found.name, arguments)

    def _streamed_arguments(self, r: Reader, name: str):
        if not self._callable(name):
            raise Reject
        self._call(name)
        try:
            yield from r.value(self._argue)
        except Reject:                                  # broken or cut: it stays a call, with what the model wrote
            self._argue("".join(r.held))
            while r.ch:
                yield
                self._argue(r.ch)

    def _function_call(self, r: Reader):
        """<function=f>{...}</function>, of which the end may be missing."""
        yield from r.expect("<function=")
        name: list[str] = []
        while r.ch and r.ch not in "<>{}\n" and len(name) < MAX_NAME:
            name.append(r.ch)
            yield
        yield from r.expect(">")
        yield from r.space()
        if r.ch == "{":
            yield from self._streamed_arguments(r, "".join(name))
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

    def _list(self, r: Reader):
        """[{JSON call}, ...] or [f(x=1), ...]. The second is held until its end."""
        yield
        yield from r.space()
        if r.ch == "{":
            yield from self._json_call(r)
            yield from r.space()
            while r.ch == ",":
                yield
                yield from r.space()
                yield from self._json_call(r)
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

    def _built_in(self, r: Reader):
        """NAME.call(query="..."); a quote that no bracket follows belongs to the query."""
        name = yield from r.name()
        yield from r.expect(".call(query=")
        if not r.ch or r.ch not in QUOTES or not self._callable(name):
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
                if r.ch and r.ch in quote + "\\":
                    query.append(r.ch)
                    yield
                else:
                    query.append("\\")
            elif r.ch:
                query.append(r.ch)
                yield
            else:
                raise Reject
        self._call(name, to_json({"query": "".join(query)}))
        yield
        r.accept()
