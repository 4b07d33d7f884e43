"""A model's text -> content and tool calls, piece by piece.

What Llama 3 models write, several in one message if need be:

    {"type": "function", "name": "f", "parameters": {...}}      JSON: also "function" for "name" (or around both), "arguments" for
                                                                "parameters", and an "id"; any other key makes it no call;
                                                                several in a row, with or without ; or ,
    [{"name": "f", "parameters": {...}}, ...]                   the same as a list
    <function=f>{...}</function>                                anywhere in a text
    [f(x=1, y="a"), g()]                                        a list of Python calls
    brave_search.call(query="...")                              a built-in tool
    anything else, after <|python_tag|>                         code for the code interpreter

The text goes character by character through a generator that reads like a grammar
(`call_grammar.section`). What may still turn out not to be a call is held; a `Reject` sends it
through again as content or code. Hence any cutting of a text into pieces gives the same message, in
time linear in its length. A JSON or <function=> call is certain at the { of its arguments, and they
stream from there; if they are broken or cut short they come out as the model wrote them (OpenAI
warns its callers of that), and another key behind them is content. All other text that is no call
is content, unchanged.

Knows no tokens: who feeds it says where <|python_tag|> stood.
"""  # noqa: E501

import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama_tp.text.call_grammar import CallDelta, CallGrammar


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
        elif delta.id is not None and delta.name is not None:
            self.tool_calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        else:
            self.tool_calls[delta.index].arguments += delta.arguments


def fold(deltas: Iterable[str | CallDelta]) -> Answer:
    """The message that a stream of deltas tells."""
    answer = Answer()
    for delta in deltas:
        answer.add(delta)
    return answer


def parse(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    python_tag: bool = False,
    parallel: bool = True,
) -> Answer:
    """A whole message at once; `python_tag` if <|python_tag|> stood before it. Never raises."""
    parser = ToolCallParser(tools, parallel)
    return fold([*parser.push(text, python_tag), *parser.finish()])


def random_id(index: int) -> str:
    """A call's id, shaped like OpenAI's."""
    return f"call_{uuid.uuid4().hex[:24]}"


def signature(tool: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(name, names of the parameters in order) of a tool in OpenAI's shape, or in the short one of
    a built-in tool, {"type": "brave_search"}."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return str(tool.get("type")), ["query"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return str(function.get("name")), list(properties) if isinstance(properties, Mapping) else []


class ToolCallParser:
    """The parser of one message.

    Args:
        tools: those of the request, in OpenAI's shape or as {"type": "brave_search"}. Only these
            can be called: text that names others is content. None: any name can be.
        parallel: False ends the message at its second call (OpenAI's parallel_tool_calls).
        new_id: from a call's index to its id.

    A server feeds it each Delta of the engine by itself (merged ones hide where the tag stood):

        tag = tokenizer.specials.get("<|python_tag|>")
        for delta in deltas:
            out = parser.push(delta.text, python_tag=tag in delta.ids)
            if delta.finish_reason:
                out += parser.finish()

    The finish reason is "tool_calls" where the engine says "stop" and `n_calls` is not 0. Where it
    says "length", the last call's arguments may end anywhere. <|eom_id|> and <|eot_id|> end an
    answer and are no part of it.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        parallel: bool = True,
        new_id: Callable[[int], str] = random_id,
    ):
        parameters = None if tools is None else dict(map(signature, tools))
        self._grammar = CallGrammar(parameters, parallel, new_id)
        self._begin_section(tagged=False)

    @property
    def n_calls(self) -> int:
        """Calls that have begun."""
        return self._grammar.n_calls

    def push(self, text: str, python_tag: bool = False) -> list[str | CallDelta]:
        """What has become certain with `text`: pieces of content (str) and of calls, in order.
        `python_tag` says that the tag came just before `text`. Never raises, whatever the text."""
        if python_tag:
            self._end_section()
            self._begin_section(tagged=True)
        self._grammar.reader.coming.extend(text)
        self._read()
        return self._take()

    def finish(self) -> list[str | CallDelta]:
        """What was held back, at the end of the message."""
        self._end_section()
        self._begin_section(tagged=False)
        return self._take()

    def _begin_section(self, tagged: bool) -> None:
        self._grammar.reader.held.clear()
        self._section = self._grammar.section(tagged)
        next(self._section)  # up to its wish for a character

    def _read(self) -> None:
        while self._grammar.reader.advance():
            next(self._section)

    def _end_section(self) -> None:
        """Shows the end to the grammar until it returns; in between it may read again what it had
        held."""
        ended: bool | None = None
        while not ended:
            self._read()
            self._grammar.reader.ch = ""
            ended = next(self._section, True)  # a bare yield is None

    def _take(self) -> list[str | CallDelta]:
        """The deltas since the last time, neighbours that continue each other joined."""
        joined: list[str | CallDelta] = []
        for _, group in itertools.groupby(
            self._grammar.out, key=lambda one: None if isinstance(one, str) else one.index
        ):
            joined.append(_as_one(list(group)))
        self._grammar.out.clear()
        return joined


def _as_one(pieces: list[str | CallDelta]) -> str | CallDelta:
    """Pieces of one call, or of one text, as a single piece."""
    calls = [piece for piece in pieces if isinstance(piece, CallDelta)]
    if calls:
        return replace(calls[0], arguments="".join(call.arguments for call in calls))
    return "".join(piece for piece in pieces if isinstance(piece, str))
