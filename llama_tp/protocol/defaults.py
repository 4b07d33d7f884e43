"""What a request means that leaves a sampling field out: the model's generation_config.json, and
over it the command's flags.

As vLLM reads that file: the six keys of KEYS and no others, so that `do_sample` and `max_length`
change nothing. Where neither says anything the request models' own defaults hold, which are
OpenAI's.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.arch.json_file import read_json
from llama_tp.engine.request import SamplingParams

FILE = "generation_config.json"
# The file's keys -> fields of a request.
KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
OPENAI = {"temperature": 1.0, "top_p": 1.0}
MAX_BYTES = 1 << 20  # honest ones have some 200 bytes
FIX = "correct the file, or give --generation_config none"


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling parameters that a request gets where it names none.

    Args:
        file: field -> value, as the model's file says it.
        flags: the same of the command line, which wins.
    """

    file: Mapping[str, float] = field(default_factory=dict)
    flags: Mapping[str, float] = field(default_factory=dict)

    def of(self, kind: str) -> dict[str, float]:
        """Field -> value for a `kind` of request. OpenAI's completions end after 16 tokens where
        they do not say it; the file, as in vLLM, leaves that alone."""
        return {
            name: value
            for name, value in self.file.items()
            if kind == "chat" or name != "max_tokens"
        } | dict(self.flags)

    def fill(
        self, data: dict[str, Any], kind: str, below: Mapping[str, float] = {}
    ) -> dict[str, Any]:
        """The body `data` with what it leaves out, or says as null; `below`: what is next in
        rank."""
        known = {**below, **self.of(kind)}
        if data.get("max_completion_tokens") is not None:
            known.pop("max_tokens", None)
        return data | {name: value for name, value in known.items() if data.get(name) is None}

    def __str__(self) -> str:
        """For people: "temperature 0.6, top_p 0.9 (generation_config.json)"."""
        values = ", ".join(
            f"{name} {value:g}" for name, value in (OPENAI | self.of("chat")).items()
        )
        places = [FILE] * bool(self.file) + ["flags"] * bool(self.flags)
        return f"{values} ({' and '.join(places) or 'as OpenAI has them'})"


def sampling_flags(**flags: float | None) -> dict[str, float]:
    """Those of a command's flags (as fields of a request) that are given. Raises UserError naming
    one that is out of range."""
    given = {name: value for name, value in flags.items() if value is not None}
    _check(
        given,
        lambda name: "--max_gen_len" if name == "max_tokens" else f"--{name}",
        "correct the value",
    )
    return given


def generation_config_of(folder: str, generation_config: str) -> dict[str, float]:
    """What a generation_config.json says, as fields of a request.

    Args:
        folder: the model's; its file is read for "auto", and may be absent.
        generation_config: "auto", "none" or a path, of such a file or of a folder with one.

    Raises UserError for a file that cannot be read, and for a value in it that no request may have.
    """
    if generation_config == "none":
        return {}
    path = folder if generation_config == "auto" else generation_config
    path = os.path.join(path, FILE) if os.path.isdir(path) else path
    if generation_config == "auto" and not os.path.lexists(path):
        return {}
    try:
        raw = read_json(path, MAX_BYTES)
    except UserError as error:
        raise UserError(error.what, error.found, FIX) from None
    found = {name: raw[key] for key, name in KEYS.items() if raw.get(key) is not None}
    keys = {name: key for key, name in KEYS.items()}
    _check(found, lambda name: f"{path}: {keys[name]}", FIX)
    return found


def _check(values: Mapping[str, Any], spelt: Callable[[str], str], fix: str) -> None:
    """Raises UserError for a value that no request may have; `spelt`: a field's name as people know
    it."""
    for name, value in values.items():
        try:
            SamplingParams(**{name: value})
        except UserError as error:
            raise UserError(error.what.replace(name, spelt(name), 1), error.found, fix) from None
