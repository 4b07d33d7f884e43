"""What a request may ask beyond plain text: tools and forms of output. The one place that says what is not there yet."""

from llama_tp.protocol.errors import invalid, unsupported
from llama_tp.protocol.fields import ChatBody, CompletionBody


def check_response_format(body: ChatBody | CompletionBody) -> None:
    """Raises RequestError unless the output may be any text."""
    if body.response_format in (None, {"type": "text"}):
        return
    raise unsupported("response_format", f"found type {str(body.response_format.get('type'))[:80]!r}",
                      'leave it out or send {"type": "text"}, and ask for the form in the prompt')


def check_tools(body: ChatBody) -> None:
    """Raises RequestError if the body asks for tools, or says something about tools that it does not give."""
    if body.tools is not None:
        raise unsupported("tools", f"found {len(body.tools)}", "describe the tools in the system message")
    if body.tool_choice not in (None, "none"):
        raise invalid("tool_choice", "tool_choice needs tools", f"found {str(body.tool_choice)[:80]!r}", "leave it out")
