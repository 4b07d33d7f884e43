"""A conversation as token ids, in the Llama 3 chat format.

    <|begin_of_text|> then per message: <|start_header_id|> role <|end_header_id|> "\\n\\n" content
    <|eot_id|> and, for an answer, the header of an assistant message whose text the model writes.

Ids equal those of llama-models' `ChatFormat` (content as it is) and, with strip=True, of Meta's
older llama3 package (content stripped). Control ids come from here alone: content, tool calls and
tool descriptions are encoded as plain text.

Tools, as Meta's page on Llama 3.1 prompts lays them out (llama-models, llama3_1/prompt_format.md):
  * offered: "Environment: ipython" opens the system message, "Tools: brave_search, wolfram_alpha"
    follows it for built-in ones, and functions are described as JSON in a user message of their own
    behind it, or in the system message. No dates are added.
  * called: a function as {"type": "function", "name": ..., "parameters": ...} <|eot_id|>; a
    built-in tool as <|python_tag|> NAME.call(query="...") or code, <|eom_id|>, the text as it is,
    without escapes. llama-models writes the tag before code only, also before content that stands
    beside it (the model had written that first), and <|eom_id|> where told to.
  * answered: by a message of the role `ipython`, also spelled `tool`.
What the model writes is read by `tool_calls`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

from llama_tp.arch.errors import UserError, short
from llama_tp.text.call_grammar import BUILT_IN, CODE
from llama_tp.text.token_table import Tokenizer

Role = Literal["system", "user", "assistant", "ipython", "tool"]


class _OfTools(TypedDict, total=False):
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


class Message(_OfTools):
    """One turn. An assistant's may have `tool_calls` in OpenAI's shape, and then None as its
    content; an `ipython` (`tool`) message carries the result of one back to the model, and may name
    it by `tool_call_id` or `name`, which nobody reads."""

    role: Role
    content: str | None


Dialog = list[Message]

_HEADER_ROLE = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "ipython": "ipython",
    "tool": "ipython",
}
_MORE_KEYS = {
    "assistant": {"tool_calls"},
    "ipython": {"tool_call_id", "name"},
    "tool": {"tool_call_id", "name"},
}
_CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Variables of the templates that Hugging Face's folders of Llama 3, 3.1 and 3.2 bring, with
# `strftime_now` a function.
_TEMPLATES_READ = frozenset(
    (
        "messages",
        "tools",
        "add_generation_prompt",
        "bos_token",
        "custom_tools",
        "builtin_tools",
        "tools_in_user_message",
        "date_string",
        "strftime_now",
        "documents",
    )
)

# Meta's words, on which the models were trained.
TOOL_PROMPT = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n{functions}\n\nReturn function calls in JSON "
    "format."
)


class DialogEncoder(Protocol):
    """From a conversation to token ids: the Llama 3 chat format, or a folder's template."""

    def encode_dialog(
        self,
        messages: Dialog,
        strip: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]: ...

    def reads(self, name: str) -> bool: ...


class ChatFormat:
    """Encodes messages for `tokenizer`. Raises UserError if it lacks one of the four control
    tokens."""

    def __init__(self, tokenizer: Tokenizer):
        lacking = [name for name in _CONTROL if name not in tokenizer.specials]
        if lacking:
            raise UserError(
                "this is not a Llama 3 chat model",
                f"its tokenizer has no {', '.join(lacking)}",
                "use an Instruct checkpoint, or send plain prompts",
            )
        self.tokenizer = tokenizer
        self._bos, self._start, self._end, self._eot = (
            tokenizer.special_id(name) for name in _CONTROL
        )
        # Llama 3 has neither of these two
        self._eom = tokenizer.specials.get("<|eom_id|>", self._eot)
        self._python_tag = (
            [tokenizer.specials["<|python_tag|>"]] if "<|python_tag|>" in tokenizer.specials else []
        )

    @staticmethod
    def reads(name: str) -> bool:
        """Whether a value of this name would change what Llama 3's own templates write, beside
        messages and tools. Here nothing can be set."""
        return name in _TEMPLATES_READ

    def encode_header(self, role: str) -> list[int]:
        """Ids that open a message of `role`."""
        if not isinstance(role, str) or role not in _HEADER_ROLE:
            raise UserError(
                "a message has an unknown role",
                f"found {role!r}",
                f"use one of {', '.join(_HEADER_ROLE)}",
            )
        # "\n\n" by itself, as Meta does: joined with the content it could merge into another token.
        return [
            self._start,
            *self.tokenizer.encode(_HEADER_ROLE[role]),
            self._end,
            *self.tokenizer.encode("\n\n"),
        ]

    def encode_message(self, message: Message, strip: bool = False) -> list[int]:
        """Ids of a whole message with its end. UserError for anything but a role, a text and what
        goes with tools."""
        _check(message)
        header, calls = self.encode_header(message["role"]), message.get("tool_calls") or []
        content = message["content"] or ""
        ids = [*header, *self.tokenizer.encode(content.strip() if strip else content)]
        if not calls:
            return [*ids, self._eot]
        named = [_named_call(call) for call in calls]
        built_in = named[0][0] in BUILT_IN
        ids += self._python_tag if built_in else []
        for name, arguments in named:
            ids += self.tokenizer.encode(call_text(name, arguments))
        return [*ids, self._eom if built_in else self._eot]

    def encode_dialog(
        self,
        messages: Dialog,
        strip: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tools_in: Literal["user", "system"] = "user",
    ) -> list[int]:
        """Ids of a conversation, and of the header that asks for the assistant's answer if
        `add_generation_prompt`.

        `tools` are those of an OpenAI request, {"type": "function", "function": {...}}, or built-in
        ones for short, {"type": "brave_search"}; a function that has the name of a built-in tool is
        that tool.
        """
        check_dialog(messages)
        ids = [self._bos]
        for message in messages if tools is None else with_tools(messages, tools, tools_in):
            ids += self.encode_message(message, strip)
        return ids + self.encode_header("assistant") if add_generation_prompt else ids


def check_dialog(messages: object) -> None:
    """Raises UserError for anything but a list of messages, each with a role, a text and what goes
    with tools."""
    if not isinstance(messages, (list, tuple)):
        raise UserError(
            "a dialog must be a list of messages",
            f"found {type(messages).__name__}",
            'write [{"role": "user", "content": "..."}]',
        )
    for message in messages:
        _check(message)


def with_tools(
    messages: Dialog,
    tools: Sequence[Mapping[str, Any]],
    tools_in: Literal["user", "system"] = "user",
) -> Dialog:
    """The dialog in which the model is told of `tools`. UserError for a tool without a proper
    name."""
    names = [tool_name(tool) for tool in tools]
    head = ["Environment: ipython"]
    if built_in := [name for name in BUILT_IN if name in names and name != CODE]:
        head.append(f"Tools: {', '.join(built_in)}")
    functions = [
        json.dumps(dict(tool), indent=4) for tool, name in zip(tools, names) if name not in BUILT_IN
    ]
    prompt = TOOL_PROMPT.format(functions="\n\n".join(functions)) if functions else None
    rest = list(messages)
    has_system = bool(rest) and isinstance(rest[0], dict) and rest[0].get("role") == "system"
    system = rest.pop(0) if has_system else {"role": "system", "content": ""}
    _check(system)
    parts = ["\n".join(head), prompt if tools_in == "system" else None, system["content"]]
    dialog: Dialog = [{"role": "system", "content": "\n\n".join(part for part in parts if part)}]
    if prompt and tools_in == "user":
        dialog.append({"role": "user", "content": prompt})
    return dialog + rest


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool of a request. UserError if it is none."""
    if isinstance(tool, Mapping):
        function = tool.get("function")
        name = (
            function.get("name")
            if isinstance(function, Mapping) and tool.get("type") == "function"
            else tool.get("type")
        )
        if isinstance(name, str) and name and (isinstance(function, Mapping) or name in BUILT_IN):
            return name
    raise UserError(
        "a tool must be a function with a name",
        f"found {short(tool)}",
        'write {"type": "function", "function": {"name": "...", "parameters": {...}}}',
    )


def call_text(name: str, arguments: str | Mapping[str, Any]) -> str:
    """A call as the model writes it. Arguments that are no JSON object stand in it as a string: the
    model broke them. Of a built-in tool's, only the query or the code has a place."""
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            found = arguments
        arguments = found if isinstance(found, dict) else arguments
    if isinstance(arguments, Mapping) and name in BUILT_IN:
        key = "code" if name == CODE else "query"
        if isinstance(text := arguments.get(key), str):
            return text if name == CODE else f'{name}.call(query="{text}")'
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def _named_call(call: object) -> tuple[str, str | Mapping[str, Any]]:
    """(name, arguments) of an OpenAI tool call."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping):
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(name, str) and name and isinstance(arguments, (str, Mapping)):
            return name, arguments
    raise UserError(
        "a tool call must have a function with a name and arguments",
        f"found {short(call)}",
        'write {"id": "...", "type": "function", "function": {"name": "...", "arguments": '
        '"{...}"}}',
    )


def _check(message: object) -> None:
    """Raises UserError unless `message` is one."""
    role = message.get("role") if isinstance(message, dict) else None
    more = _MORE_KEYS.get(role, set()) if isinstance(role, str) else set()
    if (
        not isinstance(message, dict)
        or not {"role", "content"} <= set(message) <= {"role", "content"} | more
    ):
        found = f"the keys {list(message)}" if isinstance(message, dict) else repr(message)[:80]
        raise UserError(
            "a message must have exactly a role and a content",
            f"found {found}",
            'write {"role": "user", "content": "..."}',
        )
    content, calls = message["content"], message.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise UserError(
            "the tool_calls of a message must be a list",
            f"found {type(calls).__name__}",
            "pass a list of calls",
        )
    if not isinstance(content, str) and not (content is None and calls):
        raise UserError(
            "the content of a message must be a text",
            f"found {type(content).__name__} in a message of {role!r}",
            "pass a string",
        )
