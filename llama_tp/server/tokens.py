"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: what lm-eval needs where it has no
tokenizer of its own."""

from typing import Any

from llama_tp.arch.errors import short
from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.logprobs import token_text
from llama_tp.protocol.order import ServedModel, encode
from llama_tp.text.token_table import Tokenizer

_TEXT, _FLAG = {"type": "string"}, {"type": "boolean"}
_ID = {"type": "integer", "minimum": 0}
SHAPES: dict[str, dict[str, Any]] = {  # JSON schemas of the bodies
    "tokenize": {
        "type": "object",
        "additionalProperties": False,
        "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
        "properties": {
            "model": _TEXT,
            "prompt": _TEXT,
            "messages": {"type": "array", "items": {"type": "object"}},
            "add_special_tokens": _FLAG,
            "add_generation_prompt": _FLAG,
            "return_token_strs": _FLAG,
        },
    },
    "detokenize": {
        "type": "object",
        "additionalProperties": False,
        "required": ["tokens"],
        "properties": {"model": _TEXT, "tokens": {"type": "array", "items": _ID}},
    },
}


def tokenize(data: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    """Ids of a text (BOS in front, unless add_special_tokens is false) or of a conversation. Raises
    RequestError.

    A special token's name by itself, without BOS, is that token: so lm-eval asks for the ids of BOS
    and EOS. In any longer text it is plain text, as in every prompt."""
    _check(data, "tokenize", model)
    flags = {
        name: _flag(data, name, default)
        for name, default in (
            ("add_special_tokens", True),
            ("add_generation_prompt", True),
            ("return_token_strs", False),
        )
    }
    if ("prompt" in data) == ("messages" in data):
        raise _wrong("prompt", "give either prompt or messages", "both or neither are there")
    if "messages" in data:
        if not isinstance(data["messages"], list) or not all(
            isinstance(each, dict) for each in data["messages"]
        ):
            raise _wrong(
                "messages", "messages must be a list of objects", f"found {short(data['messages'])}"
            )
        ids = encode(model, data["messages"], flags["add_generation_prompt"])
    else:
        if not isinstance(data["prompt"], str):
            raise _wrong("prompt", "prompt must be a text", f"found {short(data['prompt'])}")
        named = (
            None if flags["add_special_tokens"] else model.tokenizer.specials.get(data["prompt"])
        )
        ids = (
            model.tokenizer.encode(data["prompt"], bos=flags["add_special_tokens"])
            if named is None
            else [named]
        )
    return {
        "count": len(ids),
        "max_model_len": model.max_seq_len,
        "tokens": ids,
        "token_strs": [token_text(model, each) for each in ids]
        if flags["return_token_strs"]
        else None,
    }


def detokenize(data: dict[str, Any], model: ServedModel) -> dict[str, Any]:
    """The text of ids, without the specials. Raises RequestError."""
    _check(data, "detokenize", model)
    ids = data.get("tokens")
    if not isinstance(ids, list) or not all(
        type(each) is int and 0 <= each < model.tokenizer.n_vocab for each in ids
    ):
        raise _wrong(
            "tokens",
            f"tokens must be a list of ids from 0 to {model.tokenizer.n_vocab - 1}",
            f"found {short(ids)}",
        )
    return {"prompt": model.tokenizer.decode(ids)}


def tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """The special tokens, in the words of HF's tokenizer_config.json."""
    names = {token_id: name for name, token_id in tokenizer.specials.items()}
    stops = [names[token_id] for token_id in tokenizer.stop_ids if token_id in names]
    return {
        "tokenizer_class": "llama_tp",
        "vocab_size": tokenizer.n_vocab,
        "bos_token": None if tokenizer.bos_id is None else names.get(tokenizer.bos_id),
        "eos_token": stops[0] if stops else None,
        "pad_token": None,
        "stop_tokens": stops,
        "add_bos_token": False,
        "chat_template": None,
    }


def _check(data: dict[str, Any], route: str, model: ServedModel) -> None:
    unknown = sorted(set(data) - set(SHAPES[route]["properties"]))
    if unknown:
        raise RequestError(
            f"{unknown[0][:64]!r} is no field of this request",
            "",
            "leave it out",
            param=unknown[0][:64],
            code="unknown_parameter",
        )
    if not isinstance(data.get("model"), str | None):
        raise _wrong("model", "model must be a text", f"found {short(data['model'])}")
    model.check_name(data.get("model"))


def _flag(data: dict[str, Any], name: str, default: bool) -> bool:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, f"{name} must be true or false", f"found {short(value)}")
    return default if value is None else value


def _wrong(param: str, what: str, found: str) -> RequestError:
    return RequestError(what, found, "correct the value", param=param, code="invalid_value")
