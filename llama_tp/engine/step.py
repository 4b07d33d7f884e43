"""One step of work as plain ints: what the driver decided and every rank carries out.

A Step says which positions of which rows are computed and where their KV goes. It never says what a
decode row's input is: that is "what the row sampled last", kept on every rank, so that a step can
be planned and sent before the one in front of it has ended. Knows no tensors and no transport; the
engine sends `encode()` as one int64 tensor.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from llama_tp.sampling.params import DRAWN_MODES, Draw, SamplingMode

# fits int32; a message of another kind is refused at its first int
_MAGIC = int.from_bytes(b"STEP", "big")
_SAMPLE, _PROMPT_LOGITS, _DECODE, _MASKED = 1, 2, 4, 8
_MODES = tuple(SamplingMode)
LATE = -3  # in the place of a sampled id, of a row whose mask had not come: the driver alone knows


class StepRow(NamedTuple):
    """The work of one row in a step: positions start .. start + n - 1.

    `row` is the slot, the same on every rank. `ids` are the n input tokens of a prefill chunk;
    empty for a decode row, whose one input is what the row sampled last. `sample`: a token is
    sampled after the last position. `prompt_logits`: the logits of every position are wanted.
    `blocks` join the row's block table from index `block_start` on; block_start 0 starts a new
    table, and so a new occupant of the row, whose cache already holds the positions before `start`
    (prefix hits).

    `mode`: how the token is sampled; with a `draw` where it is one of DRAWN_MODES. `masked`: only
    some tokens may be sampled, and which travels behind the step; never in mode GATHERED, since the
    driver has the mask.
    """

    row: int
    start: int
    n: int
    ids: tuple[int, ...]
    sample: bool
    prompt_logits: bool
    block_start: int
    blocks: tuple[int, ...]
    mode: SamplingMode = SamplingMode.GATHERED
    draw: Draw | None = None
    masked: bool = False

    @property
    def decodes(self) -> bool:
        return not self.ids

    @property
    def fresh(self) -> bool:
        """A new occupant: what the ranks remember of the row's last one is void."""
        return self.block_start == 0


class Step(NamedTuple):
    """Rows that are computed together, decode rows first. `number` counts steps from 0 and names
    them in errors."""

    number: int
    rows: tuple[StepRow, ...]

    @property
    def n_tokens(self) -> int:
        return sum(row.n for row in self.rows)

    def encode(self) -> list[int]:
        """[magic, count of all ints, number, rows] and for each row [row, start, n, flags,
        block_start, count of blocks, mode, ids ..., blocks ..., draw ...]. A decode row has no ids,
        and only a row with one of DRAWN_MODES a draw."""
        ints = [_MAGIC, 0, self.number, len(self.rows)]
        for row in self.rows:
            flags = (
                _SAMPLE * row.sample
                | _PROMPT_LOGITS * row.prompt_logits
                | _DECODE * row.decodes
                | _MASKED * row.masked
            )
            ints += (
                row.row,
                row.start,
                row.n,
                flags,
                row.block_start,
                len(row.blocks),
                row.mode,
                *row.ids,
                *row.blocks,
                *(row.draw or ()),
            )
        ints[1] = len(ints)
        return ints

    @classmethod
    def decode(cls, ints: Sequence[int]) -> "Step":
        """The Step that `encode` wrote. Raises ValueError for anything that `encode` does not
        write: ranks that have lost count of the messages must end there, and not in a collective
        that waits for ever."""
        if len(ints) < 4 or ints[0] != _MAGIC or ints[1] != len(ints) or min(ints) < 0:
            raise ValueError(f"not a step: {len(ints)} ints that begin {list(ints[:4])}")
        rest, rows = iter(ints[4:]), list[StepRow]()
        for _ in range(ints[3]):
            head = list(islice(rest, 7))
            if len(head) < 7:
                raise ValueError(f"step {ints[2]} ends within row {len(rows)} of {ints[3]}")
            row, start, n, flags, block_start, n_blocks, mode = head
            ids = tuple(islice(rest, 0 if flags & _DECODE else n))
            blocks = tuple(islice(rest, n_blocks))
            n_draw = len(Draw._fields) if mode in DRAWN_MODES else 0
            draw = tuple(islice(rest, n_draw))
            good_ids = n == 1 if flags & _DECODE else n == len(ids) > 0
            whole = len(blocks) == n_blocks and len(draw) == n_draw and mode < len(_MODES)
            if not good_ids or not whole or flags > (_SAMPLE | _PROMPT_LOGITS | _DECODE | _MASKED):
                raise ValueError(f"step {ints[2]}: row {len(rows)} of {ints[3]} is damaged: {head}")
            rows.append(
                StepRow(
                    row,
                    start,
                    n,
                    ids,
                    bool(flags & _SAMPLE),
                    bool(flags & _PROMPT_LOGITS),
                    block_start,
                    blocks,
                    _MODES[mode],
                    Draw(*draw) if draw else None,
                    bool(flags & _MASKED),
                )
            )
        if next(rest, None) is not None:
            raise ValueError(f"step {ints[2]}: ints are left over after its {ints[3]} rows")
        if len({row.row for row in rows}) != len(rows):
            raise ValueError(f"step {ints[2]} names a row twice: {[row.row for row in rows]}")
        return cls(ints[2], tuple(rows))
