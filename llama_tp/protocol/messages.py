"""OpenAI's chat messages to the dialog that text.chat_format encodes. Text only; what it cannot
hold is refused by name."""

from typing import Any, cast

from llama_tp.arch.errors import short
from llama_tp.protocol.errors import RequestError, invalid, unsupported
from llama_tp.text.chat_format import Dialog, Message, Role

# OpenAI's roles, and ipython, which is Llama's own word for tool.
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "ipython": "ipython",
}
_KEPT = {
    "assistant": {"tool_calls"},
    "tool": {"tool_call_id", "name"},
    "ipython": {"tool_call_id", "name"},
}
# Of answers sent back; and a speaker's name, which agents' libraries send and for which the chat
# format has no place.
_IGNORED = {"refusal", "annotations", "reasoning_content", "name"}


def dialog_of(messages: list[dict[str, Any]]) -> Dialog:
    """The messages with a text each, or with calls: "developer" is spelt "system", text parts are
    joined by line ends.

    Raises RequestError naming the message and its field."""
    if not messages:
        raise invalid("messages", "messages is empty", "", "send one message at least")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> Message:
    message = {key: value for key, value in message.items() if value is not None}
    role = message.pop("role", None)
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"{where}.role", f"found {short(role)}", f"use one of {', '.join(_ROLES)}")
    content = message.pop("content", None)
    kept = {
        key: value for key, value in message.items() if key in _KEPT.get(role, ()) and value != []
    }
    for key in message:
        if key not in _IGNORED and key not in _KEPT.get(role, ()):
            raise unsupported(
                f"{where}.{key[:64]}", "", "leave it out: the chat format has no place for it"
            )
    text = (
        None if content is None and "tool_calls" in kept else _content(content, f"{where}.content")
    )
    # no more keys than Message has: `kept` are some of _KEPT
    return cast(Message, {"role": _ROLES[role], "content": text} | kept)


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(
            where, f"found {type(content).__name__}", "send a text, or a list of text parts"
        )
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise unsupported(
            where, f"found a part of type {str(kind)[:64]}", "this model reads text parts only"
        )
    text = part.get("text")
    if not isinstance(text, str) or set(part) - {"type", "text", "cache_control"}:
        raise _wrong(
            where, f"found the keys {short(list(part))}", 'write {"type": "text", "text": "..."}'
        )
    return text


def _wrong(where: str, found: str, fix: str) -> RequestError:
    return invalid(where, f"{where} has a wrong value", found, fix)
