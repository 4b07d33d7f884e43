"""Finds a model's tokenizer, says what is wrong with the file, and opens it as the right kind.

Which file it is decides its content, not its name: Meta's tokenizer.model and sentencepiece's
(Llama 2) share one. What the kinds do with their content is in `meta` and `hf`.
"""

import os
from pathlib import Path

from llama_tp.arch.errors import UserError
from llama_tp.arch.json_file import Fields, read_json
from llama_tp.arch.regular_file import list_folder, read_file
from llama_tp.text.hf import HfTokenizer
from llama_tp.text.meta import TiktokenTokenizer
from llama_tp.text.token_table import Tokenizer

# In this order. HF repositories keep Meta's files under original/; the 405B's are one folder
# deeper.
PLACES = (
    "tokenizer.model",
    "tokenizer.json",
    "original/tokenizer.model",
    "original/mp16/tokenizer.model",
    "original/mp8/tokenizer.model",
)
MAX_BYTES = 64 << 20  # the largest known, Gemma's tokenizer.json, has 33 MB
MAX_IDS = 1000  # in a list of stop ids


def open_tokenizer(path: str | None, ckpt_dir: str) -> Tokenizer:
    """The tokenizer at `path` (a tokenizer.model, a tokenizer.json or a folder), by default that of
    `ckpt_dir`.

    Stop ids and the beginning of a prompt come from the small JSON files beside it or in
    `ckpt_dir`. Raises UserError, naming file and fix, for a missing, cut, foreign (sentencepiece)
    or undownloaded (LFS pointer, web page) file.
    """
    tokenizer = _open(path, ckpt_dir)
    tokenizer.source = (path, ckpt_dir)
    return tokenizer


def _open(path: str | None, ckpt_dir: str) -> Tokenizer:
    place = Path(path or ckpt_dir)
    if place.is_dir():
        candidates = [place / name for name in PLACES if os.path.lexists(place / name)]
    elif os.path.lexists(place):
        candidates = [place]
    else:
        raise UserError(
            f"there is no tokenizer at {place}",
            "no such file or folder",
            "give --tokenizer_path a tokenizer.model, a tokenizer.json or a folder that holds one",
        )
    if not candidates:
        names = list_folder(str(place))
        raise UserError(
            f"no tokenizer in {place}",
            f"looked for {', '.join(PLACES[:3])}; the folder has "
            f"{', '.join(names[:10]) or 'no files'}",
            "download tokenizer.model into it or give --tokenizer_path",
        )
    for file in candidates:
        data = read_file(str(file), MAX_BYTES)
        if _is_sentencepiece(data):  # HF folders of Llama 2 keep a tokenizer.json beside it
            continue
        # where to look first
        beside, ckpt = [file.parent, Path(ckpt_dir)], [Path(ckpt_dir), file.parent]
        if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            tokens = _settings("tokenizer_config.json", beside)
            generation = _settings("generation_config.json", ckpt)
            config = _settings("config.json", ckpt)
            _check_names(tokens)
            _check_ids(generation)
            _check_ids(config)
            return HfTokenizer(data, str(file), tokens.raw, generation.raw, config.raw)
        return TiktokenTokenizer(
            data, str(file), stop_at_eom=_is_llama_3_1(_settings("params.json", ckpt))
        )
    raise UserError(
        f"{candidates[0]} is a sentencepiece tokenizer (Llama 1 and 2), which llama_tp does not "
        "read",
        "no tokenizer.json beside it",
        "use a Llama 3 checkpoint, or write a tokenizer.json with transformers: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )


def check_vocab(tokenizer: Tokenizer, config_vocab_size: int) -> None:
    """Raises UserError, with both numbers, when the tokenizer cannot belong to an embedding of so
    many rows.

    Embeddings may have more rows than there are ids (padding, deepseek-llm has 2.3% of it), but
    less than half the rows used is another model's tokenizer.
    """
    if not config_vocab_size / 2 <= tokenizer.n_vocab <= config_vocab_size:
        raise UserError(
            "the tokenizer does not belong to this model",
            f"tokenizer has {tokenizer.n_vocab:,} entries, embedding {config_vocab_size:,}",
            "give --tokenizer_path the tokenizer that came with the checkpoint",
        )


def _is_sentencepiece(data: bytes) -> bool:
    """A protobuf: its first field is a piece, newline-tagged, and Llama's first pieces are <unk>
    and control bytes.
    A tiktoken file or JSON has none of the control bytes."""
    return data[:1] == b"\n" and any(value < 9 for value in data[:200])


def _settings(name: str, folders: list[Path]) -> Fields:
    """The JSON object called `name` in the first of `folders` that has one, an empty one if none
    has."""
    for folder in folders:
        path = str(folder / name)
        if os.path.lexists(path):
            return Fields(read_json(path), path)
    return Fields({}, name)


def _check_names(config: Fields) -> None:
    """tokenizer_config.json names a token as a text, or as {"content": text}."""
    for key in ("bos_token", "eos_token"):
        if isinstance(config.raw.get(key), dict):
            config.object(key).text("content", None)
        else:
            config.text(key, None)


def _check_ids(config: Fields) -> None:
    for key in ("bos_token_id", "eos_token_id"):
        found = config.raw.get(key)
        ids = found if isinstance(found, list) else [] if found is None else [found]
        # -1: none
        if len(ids) > MAX_IDS or any(type(i) is not int or not -1 <= i < 1 << 31 for i in ids):
            raise config.wrong(key, "a token id or a list of them")


def _is_llama_3_1(params: Fields) -> bool:
    """Llama 3.1 and later scale their RoPE, and only they were trained to end a tool call with
    <|eom_id|>. Without a params.json: yes, as a Llama 3 never emits that id."""
    params = params.object("model") if isinstance(params.raw.get("model"), dict) else params
    return not params.raw or params.flag("use_scaled_rope")
