"""The request models of /v1/chat/completions and /v1/completions, and from a dict to one of them.

Types only, strictly (no bool for an int, no NaN); what values a sampling field may have,
`SamplingParams` knows alone. The fields with forms of their own (messages, prompt, stop, tools,
response_format) are read where they are used.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from llama_tp.arch.errors import short
from llama_tp.protocol.errors import RequestError, invalid
from llama_tp.protocol.refused import known_fields

# pydantic makes a message for every wrong value, and a body may hold millions: lists fail fast, and
# of this dict SamplingParams looks at the values
_Biases = Annotated[
    dict[str, Any], WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})
]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Shape):
    """Of a stream: `include_usage` adds a chunk with the counts, `continuous_usage_stats` (vLLM's)
    the counts to every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers who count bytes; never added


class Body(_Shape):
    """What both kinds of request have. Defaults are OpenAI's; those below the line are vLLM's extra
    fields."""

    model: str | None = Field(None, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: _Biases = {}
    seed: int | None = None
    stop: Any = None  # a text or a list of texts
    # ---
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop_token_ids: Any = None  # a list of token ids
    ignore_eos: bool = False
    return_token_ids: bool = False
    response_format: dict[str, Any] | None = None  # OpenAI's
    structured_outputs: dict[str, Any] | None = None
    # for the chat template, and the next: refused where it reads them
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None  # OpenAI's
    regex: str | None = None
    grammar: str | None = None


class ChatBody(Body):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(fail_fast=True)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # wins over max_tokens, its old name
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = Field(None, fail_fast=True)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # ---
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # a second BOS: true is refused
    echo: bool = False  # of the last message: true is refused


class CompletionBody(Body):
    """The body of POST /v1/completions."""

    prompt: Any  # a text, token ids, or a list of either
    max_tokens: int = 16  # 0: score the prompt (with echo and logprobs), write nothing
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    # ---
    add_special_tokens: bool = True  # BOS in front of a text; never in front of ids


BODIES: dict[str, type[ChatBody] | type[CompletionBody]] = {
    "chat": ChatBody,
    "completion": CompletionBody,
}
PATHS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}


def check_body(kind: str, data: dict[str, Any]) -> ChatBody | CompletionBody:
    """`data` as the body of a request of `kind` ("chat" or "completion"). Raises RequestError
    naming the first wrong field."""
    shape = BODIES[kind]
    data = known_fields(data, shape.model_fields)
    try:
        body = shape.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None
    if "stream_options" in data and not body.stream:
        raise invalid(
            "stream_options",
            "stream_options is only for streams",
            "stream is not true",
            "set stream, or leave it out",
        )
    return body


def _refusal(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{str(part)[:64]}" for part in first["loc"]
    ).lstrip(".")
    if first["type"] == "missing":
        return RequestError(
            f"{path} is missing", "", f"send {path}", param=path, code="missing_required_parameter"
        )
    if first["type"] == "extra_forbidden":
        return RequestError(
            f"{path} is not known", "", "leave it out", param=path, code="unknown_parameter"
        )
    found = f"found {short(first['input'])} ({type(first['input']).__name__})"
    return invalid(
        path, f"{path} has a wrong value", found, first["msg"][:1].lower() + first["msg"][1:]
    )
