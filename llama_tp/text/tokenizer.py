"""Finds a model's tokenizer, says what is wrong with the file, and opens it as the right kind.

Which file it is decides its content, not its name: Meta's tokenizer.model and sentencepiece's (Llama 2) share one.
What the kinds do with their content is in `meta` and `hf`.
"""

import json
from pathlib import Path

from llama_tp.spec.errors import UserError
from llama_tp.text.hf import HfTokenizer
from llama_tp.text.meta import TiktokenTokenizer
from llama_tp.text.token_table import Tokenizer

# In this order. HF repositories keep Meta's files under original/; the 405B's are one folder deeper.
PLACES = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model", "original/mp16/tokenizer.model",
          "original/mp8/tokenizer.model")


def open_tokenizer(path: str | None, ckpt_dir: str) -> Tokenizer:
    """The tokenizer at `path` (a tokenizer.model, a tokenizer.json or a folder), by default that of `ckpt_dir`.

    Stop ids and the beginning of a prompt come from the small JSON files beside it or in `ckpt_dir`. Raises UserError,
    naming file and fix, for a missing, cut, foreign (sentencepiece) or undownloaded (LFS pointer, web page) file.
    """
    tokenizer = _open(path, ckpt_dir)
    tokenizer.source = (path, ckpt_dir)
    return tokenizer


def _open(path: str | None, ckpt_dir: str) -> Tokenizer:
    place = Path(path or ckpt_dir)
    if place.is_file():
        candidates = [place]
    elif place.is_dir():
        candidates = [place / name for name in PLACES if (place / name).is_file()]
    else:
        raise UserError(f"there is no tokenizer at {place}", "no such file or folder",
                        "give --tokenizer_path a tokenizer.model, a tokenizer.json or a folder that holds one")
    if not candidates:
        names = sorted(entry.name for entry in place.iterdir())
        raise UserError(f"no tokenizer in {place}",
                        f"looked for {', '.join(PLACES[:3])}; the folder has {', '.join(names[:10]) or 'no files'}",
                        "download tokenizer.model into it or give --tokenizer_path")
    for file in candidates:
        data = _read(file)
        if _is_sentencepiece(data):                         # HF folders of Llama 2 keep a tokenizer.json beside it
            continue
        beside, ckpt = [file.parent, Path(ckpt_dir)], [Path(ckpt_dir), file.parent]     # where to look first
        if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return HfTokenizer(data, str(file), _settings("tokenizer_config.json", beside),
                               _settings("generation_config.json", ckpt), _settings("config.json", ckpt))
        return TiktokenTokenizer(data, str(file), stop_at_eom=_is_llama_3_1(_settings("params.json", ckpt)))
    raise UserError(f"{candidates[0]} is a sentencepiece tokenizer (Llama 1 and 2), which llama_tp does not read",
                    "no tokenizer.json beside it",
                    "use a Llama 3 checkpoint, or write a tokenizer.json with transformers: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")


def check_vocab(tokenizer: Tokenizer, config_vocab_size: int) -> None:
    """Raises UserError, with both numbers, when the tokenizer cannot belong to an embedding of so many rows.

    Embeddings may have more rows than there are ids (padding, deepseek-llm has 2.3% of it), but less than half the
    rows used is another model's tokenizer.
    """
    if not config_vocab_size / 2 <= tokenizer.n_vocab <= config_vocab_size:
        raise UserError("the tokenizer does not belong to this model",
                        f"tokenizer has {tokenizer.n_vocab:,} entries, embedding {config_vocab_size:,}",
                        "give --tokenizer_path the tokenizer that came with the checkpoint")


def _read(file: Path) -> bytes:
    """Content of `file`, if it is what it claims to be and not what stands in for it after a failed download."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}", error.strerror or str(error), "check its permissions") from None
    start = data[:200].lstrip().lower()
    if not start:
        raise UserError(f"{file} is empty", f"{len(data)} bytes", "download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a Git LFS pointer, not the file itself", f"{len(data)} bytes",
                        "run `git lfs pull` in that folder")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{file} is a web page, not the file itself", f"it begins with {data[:40]!r}",
                        "download it again: is HF_TOKEN set and the licence accepted?")
    return data


def _is_sentencepiece(data: bytes) -> bool:
    """A protobuf: its first field is a piece, newline-tagged, and Llama's first pieces are <unk> and control bytes.
    A tiktoken file or JSON has none of the control bytes."""
    return data[:1] == b"\n" and any(value < 9 for value in data[:200])


def _settings(name: str, folders: list[Path]) -> dict:
    """The JSON object called `name` in the first of `folders` that has one, {} if none has."""
    for folder in folders:
        if (folder / name).is_file():
            try:
                found = json.loads(_read(folder / name).decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{folder / name} is not JSON", str(error),
                                "correct the file or download it again") from None
            if not isinstance(found, dict):
                raise UserError(f"{folder / name} must hold a JSON object", f"found a {type(found).__name__}",
                                "correct the file or download it again")
            return found
    return {}


def _is_llama_3_1(params: dict) -> bool:
    """Llama 3.1 and later scale their RoPE, and only they were trained to end a tool call with <|eom_id|>. Without a
    params.json: yes, as a Llama 3 never emits that id."""
    nested = params.get("model")
    params = nested if isinstance(nested, dict) else params
    return not params or bool(params.get("use_scaled_rope"))
