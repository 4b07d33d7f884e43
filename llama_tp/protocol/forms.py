"""The form that an answer must have, out of the fields that ask for one: OpenAI's response_format
(and what others have put into it), tool_choice and strict tools, vLLM's structured_outputs, and
regex and grammar by themselves.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llama_tp.arch.errors import UserError, short
from llama_tp.protocol.errors import RequestError, invalid, unsupported
from llama_tp.protocol.fields import ChatBody, CompletionBody
from llama_tp.protocol.reading import read_json
from llama_tp.protocol.tools import Tools
from llama_tp.text.grammar import Form, json_object, json_schema, lark, regex, tool_call
from llama_tp.text.grammar_pool import Busy, GrammarPool

# The types of a response_format -> the keys that carry the form, one of which may be there:
# OpenAI's, those of Hugging Face's TGI ("value", and the types json and regex), and "schema" beside
# json_object, which llama.cpp has brought up.
T = TypeVar("T")
_CARRIERS: dict[str, tuple[str, ...]] = {
    "text": (),
    "json_object": ("schema", "value"),
    "json_schema": ("json_schema", "value"),
    "json": ("value", "schema"),
    "regex": ("value",),
}
_TYPED_ELSEWHERE = {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
_SCHEMA_KEYS = {"name", "description", "schema", "strict"}
_ONE = (
    'send {"json": schema}, {"regex": ...}, {"choice": [...]}, {"grammar": ...} '
    'or {"json_object": true}'
)


def read_form(body: ChatBody | CompletionBody, tools: Tools | None) -> tuple[str, Form] | None:
    """(the field that asks for it, the form), or None where any text will do. Raises RequestError
    naming a field that is wrong, or two that ask for different things."""
    found = {}
    for name, read in (
        ("response_format", _of_response_format),
        ("structured_outputs", _of_structured_outputs),
        ("regex", regex),
        ("grammar", lark),
    ):
        value = getattr(body, name)
        form = None if value is None else _read(name, read, value)
        if form:
            found[name] = form
    if tools and (tools.must_call or tools.strict):
        name = "tool_choice" if tools.must_call else "tools"
        found[name] = _read(
            name,
            lambda _: tool_call(
                tools.offered, tools.only, tools.parallel, or_text=not tools.must_call
            ),
            None,
        )
    if len(found) > 1:
        names = list(found)
        raise invalid(
            names[1], "an answer has one form", f"found {' and '.join(names)}", "send one of them"
        )
    return next(iter(found.items()), None)


def check_form(param: str, form: Form, pool: GrammarPool) -> None:
    """Raises RequestError for a form that cannot be followed, or whose check would hold up others.
    May take seconds: not for an event loop."""
    try:
        _read(param, pool.try_form, form)
    except Busy as error:
        raise too_many_forms(param, error) from None


def too_many_forms(param: str, error: UserError) -> RequestError:
    """429: a form that cannot be looked at now."""
    refusal = RequestError(
        error.what, error.found, error.fix, param=param, code="rate_limit_exceeded", status=429
    )
    refusal.retry_s = 1
    return refusal


def _read(param: str, read: Callable[[Any], T], value: object) -> T:
    try:
        return read(value)
    except (RequestError, Busy):
        raise
    except UserError as error:
        raise invalid(param, error.what, error.found, error.fix) from None


def _of_response_format(value: Mapping[str, Any]) -> Form | None:
    kind, given = (
        value.get("type"),
        sorted(name for name, each in value.items() if each is not None and name != "type"),
    )
    if not isinstance(kind, str) or kind not in _CARRIERS:
        raise invalid(
            "response_format.type",
            "response_format has a wrong type",
            f"found {short(kind)}",
            f"send one of {', '.join(_CARRIERS)}",
        )
    for name in given:
        if name not in _CARRIERS[kind]:
            raise unsupported(
                f"response_format.{name[:64]}", f"beside the type {kind}", "leave it out"
            )
    if kind == "text":
        return None
    if kind == "json_object" and not given:
        return json_object()
    if len(given) != 1:
        names = _CARRIERS[kind]
        raise invalid(
            f"response_format.{names[0]}",
            f"a response_format of the type {kind} must hold {' or '.join(names)}",
            f"found {' and '.join(given) or 'none'}",
            "send one",
        )
    carried, where = value[given[0]], f"response_format.{given[0]}"
    if kind == "regex":
        return regex(carried)
    return json_schema(
        _named_schema(carried, where) if kind == "json_schema" else _object_schema(carried)
    )


def _named_schema(value: object, where: str) -> object:
    """The schema of OpenAI's {"name", "schema"}; the name changes nothing, and not everybody sends
    one."""
    if (
        not isinstance(value, Mapping)
        or (value.get("name") is None and value.get("schema") is None)
        or not isinstance(value.get("name", ""), str | None)
    ):
        raise invalid(
            where,
            "json_schema must have a name and a schema",
            f"found {short(value)}",
            'send {"name": "...", "schema": {...}}',
        )
    if unknown := set(value) - _SCHEMA_KEYS:
        raise unsupported(f"{where}.{min(unknown)[:64]}", "", "leave it out")
    schema = value.get("schema")
    return {"type": "object"} if schema is None else schema


def _object_schema(value: object) -> object:
    """The schema beside json_object, and TGI's json: of an object, also where it says no more than
    `properties`."""
    schema = _schema(value)
    return (
        {"type": "object", **schema}
        if isinstance(schema, Mapping) and not schema.keys() & _TYPED_ELSEWHERE
        else schema
    )


def _schema(value: object) -> object:
    """A schema, which vLLM's and TGI's clients may send as a text of JSON. Raises UserError."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value.encode(), "the JSON schema")
    except RequestError as error:  # of the whole body's kind: it names no field
        raise UserError(error.what, error.found, error.fix) from None


def _of_structured_outputs(value: Mapping[str, Any]) -> Form | None:
    given = {name: each for name, each in value.items() if each is not None and each is not False}
    if not given:
        return None
    [(name, wanted), *more] = given.items()
    if more or name not in ("json", "regex", "choice", "grammar", "json_object"):
        raise invalid(
            "structured_outputs",
            "structured_outputs must ask for one form",
            f"found {short(list(given))}",
            _ONE,
        )
    if name == "choice":
        if (
            not isinstance(wanted, list)
            or not wanted
            or not all(isinstance(each, str) and each for each in wanted)
        ):
            raise invalid(
                "structured_outputs.choice",
                "choice must be a list of texts",
                f"found {short(wanted)}",
                _ONE,
            )
        return regex("|".join(map(_literal, wanted)))
    if name == "json":
        return json_schema(_schema(wanted))
    return (
        json_object() if name == "json_object" else {"regex": regex, "grammar": lark}[name](wanted)
    )


def _literal(text: str) -> str:
    """A regex of Rust's syntax for exactly this text."""
    return re.sub(
        r"[^\w\s]|_",
        lambda found: "\\" + found[0] if found[0].isascii() and found[0] != "_" else found[0],
        text,
    )
