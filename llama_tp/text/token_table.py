"""What every tokenizer here is: a table from token id to bytes, a set of special ids, and a way to
cut text into ids.

Decoding, range checks and the rules that must not depend on the file's format live here, once:
text that spells a special token is plain text (a prompt cannot forge a chat header), specials have
no text of their own, lone surrogates become U+FFFD before any library sees them. Knows no file
formats: see `meta` and `hf`.
"""

from collections.abc import Callable, Iterable

from llama_tp.arch.errors import UserError


class Tokenizer:
    """Strings to token ids and back.

    Args:
        token_bytes: the bytes of every id, b"" for specials and for ids that the file leaves out.
        specials: name -> id of the control tokens.
        bos_id: the beginning-of-text token, None where the model has none.
        stop_ids: the ids that end a completion.
        to_ids: well-formed text -> ids, never a special id.
        to_prompt_ids: the same with the special ids that the model expects around a prompt;
            `bos_id` in front unless given.
    """

    def __init__(
        self,
        token_bytes: list[bytes],
        specials: dict[str, int],
        bos_id: int | None,
        stop_ids: Iterable[int],
        to_ids: Callable[[str], list[int]],
        to_prompt_ids: Callable[[str], list[int]] | None = None,
    ):
        self.n_vocab = len(token_bytes)
        self.specials = specials
        self.bos_id = bos_id
        self.stop_ids = tuple(sorted(set(stop_ids)))
        # what `open_tokenizer` was given, for other processes to open it again
        self.source: tuple[str | None, str] | None = None
        self._token_bytes = token_bytes
        self._to_ids, self._to_prompt_ids = to_ids, to_prompt_ids or self._after_bos

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of `text`; with `bos` those of a prompt, BOS in front where the model expects one.
        Never reads special tokens out of the text. An empty prompt is `bos_id` where there is one,
        also for a model that expects none before a text: as in transformers' generate()."""
        if not bos:
            return self._to_ids(well_formed(text))
        return self._to_prompt_ids(well_formed(text)) or self._after_bos("")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without the specials; bytes that are no UTF-8 become U+FFFD. UserError for
        an unknown id."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, which may be part of a character; b"" for specials. UserError if
        there is no such id."""
        if not 0 <= token_id < self.n_vocab:
            raise UserError(
                "no such token id",
                f"{token_id}; this tokenizer has the ids 0 to {self.n_vocab - 1}",
                "use ids made by this model's own tokenizer",
            )
        return self._token_bytes[token_id]

    def special_id(self, name: str) -> int:
        """Id of the special token called `name`, e.g. "<|eot_id|>". UserError if this tokenizer has
        none."""
        if name not in self.specials:
            raise UserError(
                f"this tokenizer has no special token {name!r}",
                f"it has {_some(self.specials)}",
                "check --tokenizer_path",
            )
        return self.specials[name]

    def _after_bos(self, text: str) -> list[int]:
        return ([] if self.bos_id is None else [self.bos_id]) + self._to_ids(text)


def well_formed(text: str) -> str:
    """Surrogate pairs joined and lone surrogates replaced, as tiktoken does it; other text is
    returned as it is."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if names
        else "none"
    )
