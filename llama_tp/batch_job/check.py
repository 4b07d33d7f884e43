"""All lines of a batch's input, looked at before any of them runs, one after the other: the file
does not sit in memory."""

import hashlib
from array import array
from dataclasses import dataclass, field

import numpy as np

from llama_tp.batch_job.lines import custom_id_of, lines_of, order_of, read_line
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.errors import RequestError, invalid
from llama_tp.protocol.forms import check_form
from llama_tp.protocol.order import ServedModel
from llama_tp.text.grammar import Form
from llama_tp.text.grammar_pool import GrammarPool

MAX_SHOWN = 20  # bad lines listed one by one


@dataclass
class Checked:
    """What is wrong with an input file. `duplicates`: numbers of lines whose custom_id an earlier
    line has already."""

    n_lines: int = 0
    n_bad: int = 0
    # number and sentence of the first bad lines
    shown: list[tuple[int, str]] = field(default_factory=list)
    duplicates: set[int] = field(default_factory=set)

    def bad(self, number: int, error: RequestError) -> None:
        self.n_bad += 1
        self.shown.append((number, str(error)))
        self.shown = sorted(self.shown)[:MAX_SHOWN]


def check_lines(path: str, model: ServedModel, defaults: SamplingDefaults, key: bytes) -> Checked:
    """Reads every line as it will be run: its shape, its fields, its length in tokens, its
    custom_id."""
    checked, forms = Checked(), _Forms(model)
    # 17 bytes a line, where the ids would be a hundred
    numbers, hashes, wrong = array("Q"), array("Q"), bytearray()
    for number, raw in lines_of(path):
        checked.n_lines += 1
        numbers.append(number)
        hashes.append(_hash(custom_id_of(raw, number)))
        wrong.append(False)
        try:
            order = order_of(read_line(raw, number), model, defaults, key)
            form = order.requests[0].params.form
            if order.form_field and form:
                forms.check(order.form_field, form)
        except RequestError as error:
            checked.bad(number, error)
            wrong[-1] = True
    forms.close()
    ids = np.frombuffer(hashes, dtype=np.uint64) if hashes else np.empty(0, np.uint64)
    by_id = np.argsort(ids, kind="stable")
    again = by_id[1:][ids[by_id[1:]] == ids[by_id[:-1]]].tolist()
    checked.duplicates = {numbers[i] for i in again}
    for i in again:
        if not wrong[i]:
            checked.bad(numbers[i], duplicate_id())
    return checked


class _Forms:
    """The forms of answers that lines ask for: each is compiled once, most jobs having one or
    two."""

    def __init__(self, model: ServedModel):
        self._model = model
        self._pool: GrammarPool | None = None
        self._good: set[int] = set()

    def check(self, field: str, form: Form) -> None:
        """Raises RequestError for a form that cannot be followed; `field` has asked for it."""
        if hash(form) not in self._good:
            self._pool = self._pool or GrammarPool(self._model.tokenizer)
            check_form(field, form, self._pool)
            self._good.add(hash(form))

    def close(self) -> None:
        if self._pool:
            self._pool.close()


def duplicate_id() -> RequestError:
    """What is wrong with a line whose custom_id is taken."""
    return invalid(
        "custom_id", "an earlier line has the same custom_id", "", "give each line one of its own"
    )


def _hash(custom_id: str) -> int:
    """64 bits: two of a million ids share one by chance in 3 of 100 million files."""
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=8).digest(), "little")
