"""Bytes from outside to a dict: JSON by its own definition, in UTF-8, with an object on top.

Python's reader takes more than that (NaN, Infinity) and gives texts that no UTF-8 can hold (a lone
surrogate): neither gets past here, so that whatever is read can also be written.
"""

import json
import re
from typing import Any, NoReturn

from llama_tp.protocol.errors import RequestError

# far above any honest body, and so far below Python's limit that whoever prints a value stays
# below, too
MAX_DEPTH = 200
# lists, objects and fields: nobody else's thread runs while they are made, a tenth of a second for
# so many
MAX_PARTS = 250_000
_MAY_BE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(data: bytes, what: str = "the body") -> dict[str, Any]:
    """The object that `data` spells. A lone surrogate in any text becomes U+FFFD.

    Raises RequestError naming `what`, and the place, for anything else.
    """
    try:
        _check_parts(data, what)
        found = json.loads(
            data.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite
        )
        if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(found) > MAX_DEPTH:
            raise RecursionError
        if _MAY_BE_SURROGATE.search(data):
            found = _well_formed(found)
    # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise RequestError(
            f"{what} is not JSON", said, "send one JSON object in UTF-8", code="invalid_json"
        ) from None
    if not isinstance(found, dict):
        raise RequestError(
            f"{what} must be a JSON object",
            f"found {type(found).__name__}",
            "send {...}",
            code="invalid_json",
        )
    return found


def _check_parts(data: bytes, what: str) -> None:
    """Raises RequestError for more than MAX_PARTS: brackets, braces and colons outside of texts."""
    if _n_parts(data) <= MAX_PARTS:
        return
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # now a quote begins or ends a text
    if data.count(b'"') > 4 * MAX_PARTS or _n_parts(b"".join(data.split(b'"')[::2])) > MAX_PARTS:
        raise RequestError(
            f"{what} holds too many lists, objects and fields",
            f"more than {MAX_PARTS:,}",
            "send fewer",
            code="too_many_parts",
        )


def _n_parts(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{") + data.count(b":")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is beyond the range of numbers")
    return value


def _depth(value: object) -> int:
    """How many lists and dicts stand around what is innermost, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (list, dict))]:
        depth, level = (
            depth + 1,
            [
                inner
                for each in level
                for inner in (each.values() if isinstance(each, dict) else each)
            ],
        )
    return depth


def _well_formed(value: object) -> object:
    """`value` with every lone surrogate replaced, in keys too."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_well_formed(each) for each in value]
    if isinstance(value, dict):
        return {_well_formed(key): _well_formed(each) for key, each in value.items()}
    return value
