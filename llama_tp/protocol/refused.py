"""Fields that clients send and that are not in the request models: which are harmless, which are
refused, and with what words.

The rule: a field that would change the output and that we do not do is refused by its name; one
that changes nothing (who asks, what to store, how to bill) is accepted and dropped; one that nobody
here knows is refused too, as a misspelt `temperature` would otherwise be a silent change of every
answer.
"""

import difflib
from collections.abc import Iterable
from typing import Any

from llama_tp.arch.errors import short
from llama_tp.protocol.errors import RequestError, unsupported

HARMLESS = frozenset(
    (
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "request_id",
        "priority",
        "spaces_between_special_tokens",
        "guided_decoding_backend",  # which library keeps a form: the same texts, whichever
        "include_reasoning",
        "thinking_token_budget",  # of what a Llama does not write
        "mm_processor_kwargs",
        "media_io_kwargs",
    )
)  # of pictures, which are refused themselves

_STRUCTURED = "use structured_outputs, which replaced it"
_TEMPLATE = "the chat format is the server's own: leave it out"
_SAMPLER = "this sampler has no such step: leave it out"
_TEXT_ONLY = "this model reads and writes text only: leave it out"
_IDS = "ask for return_token_ids instead"

# Name -> (values that ask for nothing, what to do instead of anything else). None always asks for
# nothing.
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "guided_json": ((), _STRUCTURED),
    "guided_regex": ((), _STRUCTURED),
    "guided_choice": ((), _STRUCTURED),
    "guided_grammar": ((), _STRUCTURED),
    "guided_whitespace_pattern": ((), _STRUCTURED),
    "chat_template": ((), _TEMPLATE),
    "tool_prompt": ((), _TEMPLATE),
    "documents": (([],), _TEMPLATE),
    "use_beam_search": ((False,), _SAMPLER),
    "length_penalty": ((1, 1.0), _SAMPLER),
    "early_stopping": ((False,), _SAMPLER),
    "typical_p": ((1, 1.0), _SAMPLER),
    "top_a": ((0, 0.0), _SAMPLER),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": ((), "use logit_bias"),
    "logits_processors": (([],), _SAMPLER),
    "include_stop_str_in_output": (
        (False,),
        "the text ends before the stop string: append it yourself",
    ),
    "skip_special_tokens": ((True,), "special tokens have no text here: " + _IDS),
    "return_tokens_as_token_ids": ((False,), _IDS),
    "detokenize": ((True,), _IDS),
    "truncate_prompt_tokens": ((), "shorten the prompt yourself"),
    "prompt_logprobs": ((), "use echo with logprobs on /v1/completions"),
    "prompt_embeds": ((), "send text or token ids: no tensors are read from requests"),
    "cache_salt": ((), "prompts that begin alike share their cache for all who may ask"),
    "suffix": (
        ("",),
        "the model continues text and does not fill gaps: put all of it in the prompt",
    ),
    "modalities": ((["text"],), _TEXT_ONLY),
    "audio": ((), _TEXT_ONLY),
    "verbosity": (("medium",), "the model has no such setting: leave it out"),
    "web_search_options": ((), "nothing is fetched from elsewhere: leave it out"),
    "functions": (([],), "use tools, which replaced it"),
    "function_call": (("none",), "use tool_choice, which replaced it"),
}


def known_fields(data: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The fields of `data` that a model which has the fields `known` may read, without those that
    are null (absent, to every client). Raises RequestError naming a field that is refused, or that
    nobody knows."""
    known = set(known)
    for name in data:
        if name in known or name in HARMLESS:
            continue
        if name not in REFUSED:
            near = difflib.get_close_matches(name[:64], known, n=1)
            fix = f"did you mean {near[0]}?" if near else "leave it out"
            raise RequestError(
                f"{name[:64]!r} is no field of this request",
                "",
                fix,
                param=name[:64],
                code="unknown_parameter",
            )
        neutral, fix = REFUSED[name]
        value = data[name]
        if value is not None and not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral
        ):
            raise unsupported(name, f"found {short(value)}", fix)
    return {name: value for name, value in data.items() if name in known and value is not None}
