"""The small JSON files of a checkpoint's folder: params.json, config.json, the index, the
tokenizer's settings.

    config = Fields(read_json(path), path)
    dim = config.whole("hidden_size", most=1 << 20)
    theta = config.number("rope_theta", 10000.0, least=1, most=1e30)

Each value is checked when it is asked for. A key nobody asks for may hold anything, and null counts
as absent, as in transformers.
"""

import json
import math
from typing import Any, Final, TypeVar, overload

from llama_tp.arch.errors import UserError, short
from llama_tp.arch.regular_file import AGAIN, read_file

# bytes; the largest known, tokenizer_config.json with 10^4 added tokens, has 2 MB
MAX_JSON = 16 << 20
D = TypeVar("D")  # what a caller gives as the default: a value of the same type, or None
_REQUIRED: Final[Any] = object()  # the default of a key that has none
_FIX = "correct it or download it again"


def key_name(key: str) -> str:
    """A key of a file for a message: as it stands there if that is printable and short."""
    return key if key.isprintable() and len(key) <= 80 else short(key)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=)`: a key given twice is an error, where plain JSON readers
    keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {short(key)} stands there twice")
            seen.add(key)
    return found


def read_json(path: str, most: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a regular file of at most `most` bytes. A byte order mark and CRLF are
    accepted; anything else odd, also a key that stands there twice, is a UserError."""
    raw = read_file(path, most)
    try:
        found = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    # ValueError: also an integer of more than 4,300 digits
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON", str(error), "correct it or " + AGAIN
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path} must hold a JSON object",
            f"found a {type(found).__name__}",
            "correct it or " + AGAIN,
        )
    return found


class Fields:
    """The values of a JSON object, `where` its name for messages. Each method gives the value of a
    key in one type, `default` where it is absent or null, and raises UserError, naming file and
    key, for a missing key without default and for anything else.
    """

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    @overload
    def whole(self, key: str, *, least: int = 1, most: int) -> int: ...
    @overload
    def whole(self, key: str, default: D, *, least: int = 1, most: int) -> int | D: ...
    def whole(self, key: str, default: Any = _REQUIRED, *, least: int = 1, most: int) -> int | Any:
        """A whole number from `least` to `most`. 8192.0 is one too; true is none."""
        value = self._value(key, default)
        if value is default or _is_number(value) and least <= value <= most and value == int(value):
            return value if value is default else int(value)
        raise self.wrong(key, f"a whole number from {least:,} to {most:,}")

    @overload
    def number(self, key: str, *, least: float, most: float) -> float: ...
    @overload
    def number(self, key: str, default: D, *, least: float, most: float) -> float | D: ...
    def number(
        self, key: str, default: Any = _REQUIRED, *, least: float, most: float
    ) -> float | Any:
        """A finite number from `least` to `most`, as a float."""
        value = self._value(key, default)
        if value is default or _is_number(value) and least <= value <= most:
            return value if value is default else float(value)
        raise self.wrong(key, f"a number from {least:g} to {most:g}")

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        found: bool = self._of_type(key, default, bool, "true or false")
        return found

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: D) -> str | D: ...
    def text(self, key: str, default: Any = _REQUIRED) -> str | Any:
        return self._of_type(key, default, str, "a text")

    def object(self, key: str) -> "Fields":
        """An object inside this one; an empty one where it is absent."""
        return Fields(self._of_type(key, {}, dict, "an object"), f"{self.where}: {key}")

    def wrong(self, key: str, wanted: str) -> UserError:
        """The complaint that the value of `key` is not what is `wanted`."""
        return UserError(
            f"{self.where}: {key} must be {wanted}", f"found {short(self.raw.get(key))}", _FIX
        )

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None and default is _REQUIRED:
            names = ", ".join(key_name(name) for name in sorted(self.raw)[:20]) + (
                ", ..." if len(self.raw) > 20 else ""
            )
            raise UserError(
                f"{self.where} lacks the key {key!r}",
                f"it has {names or 'no keys'}",
                "take the file again from where the checkpoint came from",
            )
        return default if value is None else value

    def _of_type(self, key: str, default: Any, kind: type, wanted: str) -> Any:
        value = self._value(key, default)
        if value is default or isinstance(value, kind):
            return value
        raise self.wrong(key, wanted)


def _is_number(value: object) -> bool:
    """Whether a value is an int or a finite float. JSON as Python reads it has NaN, Infinity and
    1e400, which is inf, too."""
    return type(value) is int or type(value) is float and math.isfinite(value)
