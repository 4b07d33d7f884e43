"""What a request may ask beyond plain text: tools, read here into what the chat format offers and the parser looks for, and forms
of output. The one place that says what of it is not there yet.
"""

from dataclasses import dataclass

from llama_tp.protocol.errors import invalid, unsupported
from llama_tp.protocol.fields import ChatBody, CompletionBody
from llama_tp.spec.errors import UserError
from llama_tp.text.chat_format import tool_name

MAX_TOOLS = 128                                             # OpenAI's bound
_FUNCTION_KEYS = {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Tools:
    """The tools that a model is told of. `parallel`: it may call several in one message."""

    offered: tuple[dict, ...]
    parallel: bool = True


def check_response_format(body: ChatBody | CompletionBody) -> None:
    """Raises RequestError unless the output may be any text."""
    if body.response_format in (None, {"type": "text"}):
        return
    raise unsupported("response_format", f"found type {str(body.response_format.get('type'))[:80]!r}",
                      'leave it out or send {"type": "text"}, and ask for the form in the prompt')


def read_tools(body: ChatBody) -> Tools | None:
    """The tools of a chat; None if there are none, or tool_choice is "none". Raises RequestError naming what is wrong."""
    choice = body.tool_choice
    if body.tools is None:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice needs tools", f"found {str(choice)[:80]!r}", "send tools, or leave it out")
        return None
    if not 0 < len(body.tools) <= MAX_TOOLS:
        raise invalid("tools", f"tools must hold 1 to {MAX_TOOLS}", f"found {len(body.tools)}", "leave it out if there are none")
    names = [_name(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise invalid("tools", "a tool's name must be its own", f"found {twice[0][:64]!r} twice", "rename one of them")
    if choice in (None, "auto"):
        return Tools(tuple(body.tools), body.parallel_tool_calls is not False)
    if choice == "none":
        return None
    if choice != "required" and not isinstance(choice, dict):
        raise invalid("tool_choice", "tool_choice has a wrong value", f"found {str(choice)[:80]!r}",
                      'send "auto", "none", "required" or {"type": "function", "function": {"name": "..."}}')
    raise unsupported("tool_choice", f"found {str(choice)[:80]!r}", 'only "auto" and "none" are: ask for the call in the prompt')


def _name(tool: dict, where: str) -> str:
    try:
        name = tool_name(tool)
    except UserError as error:
        raise invalid(where, error.what, error.found, error.fix) from None
    function = tool.get("function") if tool.get("type") == "function" else {}
    if unknown := [key for key in (*tool, *function) if key not in {"type", "function"} | _FUNCTION_KEYS]:
        raise unsupported(f"{where}.{unknown[0][:64]}", "", "leave it out")
    if function.get("strict"):
        raise unsupported(f"{where}.function.strict", "found true", "leave it out: arguments are not forced into the schema")
    if not isinstance(function.get("parameters", {}), dict):
        raise invalid(f"{where}.function.parameters", "a tool's parameters must be a JSON schema", "", "send an object")
    return name
