"""The tools of a request, read into what the chat format offers, the parser looks for and a form
may demand."""

from dataclasses import dataclass, replace
from typing import Any

from llama_tp.arch.errors import UserError, short
from llama_tp.protocol.errors import invalid, unsupported
from llama_tp.protocol.fields import ChatBody
from llama_tp.text.chat_format import tool_name

MAX_TOOLS = 128  # OpenAI's bound
_FUNCTION_KEYS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Tools:
    """The tools that a model is told of.

    parallel: it may call several in one message. must_call: it has to call one, `only` that one if
    given. strict: the arguments of its calls have to follow the tools' schemas.
    """

    offered: tuple[dict[str, Any], ...]
    parallel: bool = True
    must_call: bool = False
    only: str | None = None
    strict: bool = False


def read_tools(body: ChatBody) -> Tools | None:
    """The tools of a chat; None if there are none, or tool_choice is "none". Raises RequestError
    naming what is wrong."""
    choice = body.tool_choice
    if body.tools is None:
        if choice not in (None, "none"):
            raise invalid(
                "tool_choice",
                "tool_choice needs tools",
                f"found {short(choice)}",
                "send tools, or leave it out",
            )
        return None
    if not 0 < len(body.tools) <= MAX_TOOLS:
        raise invalid(
            "tools",
            f"tools must hold 1 to {MAX_TOOLS}",
            f"found {len(body.tools)}",
            "leave it out if there are none",
        )
    names = [_name(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise invalid(
            "tools",
            "a tool's name must be its own",
            f"found {twice[0][:64]!r} twice",
            "rename one of them",
        )
    if choice == "none":
        return None
    only = _only(choice, names)
    tools = Tools(
        tuple(body.tools),
        body.parallel_tool_calls is not False,
        choice not in (None, "auto"),
        only,
        any(tool.get("function", {}).get("strict") for tool in body.tools),
    )
    return replace(tools, parallel=False) if only else tools


def _only(choice: object, names: list[str]) -> str | None:
    """The name in tool_choice, if it is of that kind."""
    if choice in (None, "auto", "required"):
        return None
    function = (
        choice.get("function")
        if isinstance(choice, dict) and choice.get("type") == "function"
        else None
    )
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise invalid(
            "tool_choice",
            "tool_choice has a wrong value",
            f"found {short(choice)}",
            'send "auto", "none", "required" or {"type": "function", "function": {"name": "..."}}',
        )
    if name not in names:
        raise invalid(
            "tool_choice",
            "tool_choice names no tool",
            f"found {name[:64]!r}",
            "name one of the tools",
        )
    return name


def _name(tool: dict[str, Any], where: str) -> str:
    try:
        name = tool_name(tool)
    except UserError as error:
        raise invalid(where, error.what, error.found, error.fix) from None
    function: dict[str, Any] = tool["function"] if tool.get("type") == "function" else {}
    if unknown := [
        key for key in (*tool, *function) if key not in {"type", "function"} | _FUNCTION_KEYS
    ]:
        raise unsupported(f"{where}.{unknown[0][:64]}", "", "leave it out")
    if not isinstance(function.get("strict", False), bool):
        raise invalid(
            f"{where}.function.strict",
            "strict must be true or false",
            f"found {short(function['strict'])}",
            "correct it",
        )
    if not isinstance(function.get("parameters", {}), dict):
        raise invalid(
            f"{where}.function.parameters",
            "a tool's parameters must be a JSON schema",
            "",
            "send an object",
        )
    return name
