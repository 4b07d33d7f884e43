"""HF's tokenizer.json, run by the `tokenizers` library: byte-level BPE (Llama 3) and
sentencepiece-made ones.

The library is an extra, imported when such a file is opened. Only its encoder is used: token bytes
are read from the vocabulary, so that streaming and decoding are the same code for every tokenizer.
Refuses to know where files lie.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.text.token_table import Tokenizer

MOST_GAPS = 1 << 20  # ids without a token
MOST_GROWTH = 4096  # Llama's normalizers put one character in front and replace one by one: 4
Library = Any  # a tokenizers.Tokenizer; the package is an extra, so its names are not known here
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class HfTokenizer(Tokenizer):
    """HF's fast tokenizer, ids as transformers gives them with split_special_tokens=True.

    Args:
        data: content of tokenizer.json; where: its name for messages.
        tokenizer_config, generation_config, config: the JSON files of these names, {} where there
          is none.

    What stands around a prompt (BOS, nothing, an EOS) is decided by the post-processor of
    tokenizer.json alone. transformers 5 does not look at add_bos_token or the class where there is
    such a file, whatever it saved there before.
    bos_id is what the post-processor puts first; else the bos token that the configs name, which
    begins empty prompts only. stop_ids are generation_config's eos_token_id, else config's, else
    tokenizer_config's eos_token.
    The space that sentencepiece puts before a text's first word stays in decoded text: a completion
    needs it.

    Raises UserError without the `tokenizers` package, and for a broken file or a decoder of another
    family.
    """

    def __init__(
        self,
        data: bytes,
        where: str,
        tokenizer_config: dict[str, Any],
        generation_config: dict[str, Any],
        config: dict[str, Any],
    ):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"{where} needs the tokenizers package",
                "it is not installed",
                "pip install 'llama_tp[hf]'",
            ) from None
        try:
            text = data.decode("utf-8-sig")
            library = tokenizers.Tokenizer.from_str(text)
            # As the library read it: Python's JSON takes half a second for the whole file of a
            # Llama 3.
            decoder = json.loads(library.decoder.__getstate__()) if library.decoder else None
            _check_growth(
                json.loads(library.normalizer.__getstate__()) if library.normalizer else {}
            )
            for adds in (False, True):  # some files are found to be broken only here
                library.encode("a", add_special_tokens=adds)
        except BaseException as error:  # the library raises bare Exception
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise UserError(
                f"{where} is not a whole tokenizer.json",
                f"{str(error)[:200]}",
                "download it again, or write it with a current transformers",
            ) from None
        _make_special(library, tokenizer_config)
        # "<|eot_id|>" in a text is seven plain characters and more
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        if getattr(library.model, "dropout", None):  # of merges, in training
            library.model.dropout = None
        vocab = library.get_vocab(with_added_tokens=True)
        specials = {
            token.content: i
            for i, token in library.get_added_tokens_decoder().items()
            if token.special
        }
        if not vocab or max(vocab.values()) - len(vocab) > MOST_GAPS:
            raise UserError(
                f"{where}: its ids leave too many gaps",
                f"{len(vocab):,} tokens, the highest id is {max(vocab.values(), default=-1):,}",
                "download it again",
            )
        super().__init__(
            _token_bytes(vocab, specials, _byte_reader(decoder, where)),
            specials,
            _bos_id(library, specials, tokenizer_config, generation_config, config),
            _stop_ids(library, tokenizer_config, generation_config, config),
            to_ids=lambda text: _ids(library, text, False),
            to_prompt_ids=lambda text: _ids(library, text, True),
        )


def _ids(library: Library, text: str, adds_specials: bool) -> list[int]:
    try:
        ids: list[int] = library.encode(text, add_special_tokens=adds_specials).ids
        return ids
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise UserError(
            "the tokenizer breaks down over this text", f"{error}"[:200], "check its tokenizer.json"
        ) from None


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code has panicked: pyo3's exception for it is no Exception, and no module has
    it."""
    return type(error).__name__ == "PanicException"


def _check_growth(normalizer: dict[str, Any]) -> None:
    """Raises ValueError for a normalizer that makes a text MOST_GROWTH times as long: few
    replacements of "a" by a thousand take all memory, and the library then ends the process."""
    growth, steps = 1, [normalizer]
    while steps:
        step = steps.pop()
        steps += step.get("normalizers", [])
        growth *= 1 + len(step.get("content") or step.get("prepend") or "")
        if growth > MOST_GROWTH:
            raise ValueError(f"its normalizer makes texts more than {MOST_GROWTH:,} times as long")


def _make_special(library: Library, tokenizer_config: dict[str, Any]) -> None:
    """Makes added tokens special that tokenizer_config names as such, as transformers does: it
    saves them with special false where a training script added them as words. Other names change
    nothing."""
    named = {_name(value) for key, value in tokenizer_config.items() if key.endswith("_token")}
    added = {
        token.content for token in library.get_added_tokens_decoder().values() if not token.special
    }
    library.add_special_tokens(sorted(named & added))


def _token_bytes(
    vocab: dict[str, int], specials: dict[str, int], to_bytes: Callable[[str], bytes]
) -> list[bytes]:
    table = [b""] * (max(vocab.values()) + 1)  # ids may have gaps: not len(vocab)
    for token, i in vocab.items():
        if token not in specials:
            table[i] = to_bytes(token)
    return table


def _byte_reader(decoder: dict[str, Any] | None, where: str) -> Callable[[str], bytes]:
    """The function from a token as tokenizer.json spells it to its bytes, chosen by the file's
    decoder."""
    steps = (decoder or {}).get("decoders") or [decoder or {}]
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace"}:
        return _sentencepiece
    raise UserError(
        f"{where}: this kind of tokenizer is not supported",
        f"its decoder is {sorted(map(str, kinds))}",
        "llama_tp reads byte-level BPE and sentencepiece-made tokenizer.json files",
    )


# Byte-level BPE spells every byte as one visible character: the visible Latin-1 ones as themselves,
# the other 68 as U+0100 onwards in order (the GPT-2 convention that all ByteLevel tokenizers
# follow).
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [value for value in range(256) if value not in _VISIBLE]
_BYTE_OF = {chr(value): value for value in _VISIBLE} | {
    chr(0x100 + i): value for i, value in enumerate(_HIDDEN)
}


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token, spelled as it is
        return token.encode("utf-8")


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode("utf-8")


def _bos_id(
    library: Library,
    specials: dict[str, int],
    tokenizer_config: dict[str, Any],
    generation_config: dict[str, Any],
    config: dict[str, Any],
) -> int | None:
    plain, whole = _ids(library, "a", False), _ids(library, "a", True)
    if whole[: len(plain)] != plain:
        return whole[0]
    candidates = (
        _named_id(library, tokenizer_config.get("bos_token")),
        generation_config.get("bos_token_id"),
        config.get("bos_token_id"),
    )
    # transformers fills in bos 1 where a config is silent: only a control token of this tokenizer
    # can be the one.
    return next((i for i in candidates if i in specials.values()), None)


def _stop_ids(
    library: Library,
    tokenizer_config: dict[str, Any],
    generation_config: dict[str, Any],
    config: dict[str, Any],
) -> list[int]:
    candidates = (
        generation_config.get("eos_token_id"),
        config.get("eos_token_id"),
        _named_id(library, tokenizer_config.get("eos_token")),
    )
    found: object = next((value for value in candidates if value is not None), [])
    listed = found if isinstance(found, list) else [found]
    ids = [i for i in listed if type(i) is int]
    if len(ids) < len(listed):
        raise UserError(
            "eos_token_id must be a token id or a list of them",
            f"found {found!r}",
            "correct generation_config.json or config.json",
        )
    return ids


def _named_id(library: Library, token: object) -> int | None:
    """Id of a token that tokenizer_config.json names."""
    name = _name(token)
    found: int | None = library.token_to_id(name) if name else None
    return found


def _name(token: object) -> str:
    """A token as tokenizer_config.json writes it: a string, or {"content": string}; else ""."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else ""
