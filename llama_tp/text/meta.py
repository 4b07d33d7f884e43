"""Meta's tokenizer.model: one "base64 rank" line a token, cut and merged by tiktoken. Any
vocabulary size.

The 256 specials are not in the file: they follow the last base token, by position. Llama 3 and 3.1
share one file and differ only in what six of the positions are called, so everything here goes by
position (llama-models `llama3/tokenizer.py` gives the names, the split pattern and the two cutting
limits). Refuses to know where files lie.
"""

import base64
import re
from collections.abc import Iterator

import tiktoken

from llama_tp.arch.errors import UserError, short
from llama_tp.text.token_table import Tokenizer

N_SPECIALS = 256
MAX_TOKENS = 1 << 20  # the largest vocabulary of this kind, o200k, has 200,000
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
SPECIALS = _NAMED + tuple(
    f"<|reserved_special_token_{2 + i}|>" for i in range(N_SPECIALS - len(_NAMED))
)
BOS, EOS, EOM, EOT = 0, 1, 8, 9  # positions after the last base token

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tiktoken panics on longer texts, and its regex stack overflows on longer runs of one kind
# (tiktoken issue 195). Ids around a cut depend on where it is: these are Meta's numbers, and must
# stay so for equal ids.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class TiktokenTokenizer(Tokenizer):
    """Meta's tokenizer. `data` is the file's content, `where` its name for messages; `stop_at_eom`
    tells Llama 3.1 and later, which end a tool call with <|eom_id|>, from Llama 3, where that
    position is reserved.

    Raises UserError naming file and line for anything but whole, gapless "base64 rank" lines.
    """

    def __init__(self, data: bytes, where: str, stop_at_eom: bool = True):
        ranks = _parse(data, where)
        n_base = len(ranks)
        token_bytes = sorted(ranks, key=ranks.__getitem__) + [b""] * N_SPECIALS
        encoding = tiktoken.Encoding(
            "llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(
            token_bytes,
            {name: n_base + i for i, name in enumerate(SPECIALS)},
            bos_id=n_base + BOS,
            stop_ids=[n_base + i for i in ((EOS, EOM, EOT) if stop_at_eom else (EOS, EOT))],
            to_ids=lambda text: [
                i for piece in pieces(text) for i in encoding.encode_ordinary(piece)
            ],
        )


def pieces(text: str) -> Iterator[str]:
    """`text` cut as Meta cuts it: every 400,000 characters, and in these every 25,000 characters of
    a run of whitespace or of non-whitespace. One pass, so that a megabyte of either costs
    milliseconds."""
    for start in range(0, len(text), MAX_CHARS):
        part = text[start : start + MAX_CHARS]
        begin = 0
        for run in _RUN.finditer(part):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]


def _parse(data: bytes, where: str) -> dict[bytes, int]:
    """token -> rank of a tokenizer.model, with ranks 0..n-1 and all 256 single bytes, so that any
    text has ids."""
    again = "the file may be cut short: download it again"
    ranks: dict[bytes, int] = {}
    if data.count(b"\n") > MAX_TOKENS:
        raise UserError(
            f"{where} has more than {MAX_TOKENS:,} lines, one a token",
            f"{len(data):,} bytes",
            again,
        )
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:  # binascii.Error is one too
            raise UserError(
                f'{where}: line {number} is not "base64 rank"', f"found {line[:60]!r}", again
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{where}: the ranks must be 0 to n-1, each once",
            f"found {len(ranks):,} tokens and a highest rank of {short(max(ranks.values()))}",
            again,
        )
    lacking = sum(bytes([value]) not in ranks for value in range(256))
    if lacking:
        raise UserError(
            f"{where}: every single byte must be a token",
            f"{lacking} of 256 are missing among {len(ranks):,} tokens",
            again,
        )
    return ranks
