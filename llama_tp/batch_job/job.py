"""A batch job: an input, an output, a model and parameters. The digest of all of them is the job's
key, from which all ids and seeds are derived.

`open_job` decides, before a model is loaded, whether the output can be begun or continued. Knows no
engine.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.arch.regular_file import open_regular
from llama_tp.batch_job.check import check_lines
from llama_tp.batch_job.journal import Journal, differences, read_job, write_job
from llama_tp.batch_job.lines import beginning, created_of, custom_id_of, lines_of
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.order import ServedModel

ANEW = "to begin anew, remove the output and its .job file, or name another --output"
# of each weight file: fine-tuned models differ in their numbers alone
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass
class Job:
    """One run of the command on rank 0.

    Attributes:
        target: where lines are written: the output, or the file that replaces it when failed lines
            are tried again.
        old: the output whose good lines are copied meanwhile, else None.
        n_lines: of the input; n_failed: of those that are done already.
        input_state: what the file system said about the input when it was looked at.
    """

    input: str
    model: ServedModel
    defaults: SamplingDefaults
    key: bytes
    sidecar: Path
    description: dict[str, Any]
    target: Journal
    n_lines: int
    duplicates: frozenset[int]
    n_failed: int = 0
    old: Journal | None = None
    input_state: tuple[int, ...] = ()

    @property
    def created(self) -> int:
        return created_of(self.key)

    @property
    def output(self) -> Path:
        return (self.old or self.target).path

    @property
    def is_done(self) -> bool:
        return self.target.n_lines == self.n_lines

    def custom_id(self, raw: bytes, number: int) -> str:
        """What the output calls a line: its custom_id, unless another line has it."""
        return f"line-{number}" if number in self.duplicates else custom_id_of(raw, number)

    def beginnings(self) -> Iterator[bytes]:
        """How each line of the output has to begin."""
        return (
            beginning(self.custom_id(raw, number), self.key) for number, raw in lines_of(self.input)
        )

    def computed_by(self, computed: dict[str, Any]) -> None:
        """Notes how the lines are computed from now on. Raises UserError if those that are done
        were computed otherwise."""
        before = self.description.get("computed")
        if before not in (None, computed) and (self.target.n_lines or self.old):
            raise UserError(
                f"the lines in {self.output} were computed in another way",
                "; ".join(differences({"": before}, {"": computed})),
                f"use the same again; {ANEW}",
            )
        self.description["computed"] = computed
        write_job(self.sidecar, self.description)

    def check_input(self) -> None:
        """Raises UserError if the input is not the file any more that was looked at."""
        if _state(self.input) != self.input_state:
            raise UserError(
                f"--input {self.input} was changed while the job ran",
                "answers may be to what stands there now",
                f"let it be while a job runs; {ANEW}",
            )

    def finish(self) -> None:
        """Puts the new file in the place of the old one, if there are two."""
        if self.old is not None:
            self.target.becomes(self.old.path)


def open_job(
    input: str,
    output: str,
    model: ServedModel,
    defaults: SamplingDefaults,
    made_of: dict[str, Any],
    skip_bad: bool,
    retry_failed: bool,
    tell: Callable[[str], None],
) -> Job:
    """Locks the output, checks the input's lines unless that has been done, and counts what is
    done.

    Args:
        made_of: what must stay the same beside the input: {"model": digest, ..., "parameters":
            {...}}.
        tell: called with each line for people.

    Raises UserError for bad lines without `skip_bad`, and for an output of another job.
    """
    state = _state(input)
    made_of = {"input": _file_digest(input), **made_of}
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).digest()
    journal, sidecar = Journal(Path(output)), Path(f"{output}.job")
    try:
        description = _description(journal, sidecar, made_of)
        if description is None or (description["n_bad"] and not skip_bad):
            description = _checked(input, model, defaults, made_of, key, skip_bad, tell)
            write_job(sidecar, description)
        job = Job(
            input,
            model,
            defaults,
            key,
            sidecar,
            description,
            journal,
            description["n_lines"],
            frozenset(description["duplicates"]),
            input_state=state,
        )
        _recover(job, Path(f"{output}.retry"), retry_failed)
    except BaseException:
        journal.discard()
        journal.close()
        raise
    return job


def _recover(job: Job, retry: Path, retry_failed: bool) -> None:
    """Counts what is done, in the output and, where failed lines are tried again, in the file that
    will replace it."""
    job.n_failed = job.target.recover(job.beginnings())
    if retry_failed and job.n_failed:
        job.old, job.target = job.target, Journal(retry)
        job.n_failed = job.target.recover(job.beginnings())
    elif retry.exists() and (job.target.is_empty or not job.n_failed):
        retry.unlink()


def _description(journal: Journal, sidecar: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """What is known about the job that the output belongs to; None if it belongs to none yet."""
    old = read_job(sidecar)
    if journal.is_empty:
        return old if old and old["made_of"] == made_of else None
    if old is None:
        raise UserError(
            f"--output {journal.path} exists, and no job is known to have written it",
            f"there is no {sidecar.name} beside it",
            "name another --output, or move it away",
        )
    found = differences(old["made_of"], made_of)
    if found:
        raise UserError(
            f"--output {journal.path} belongs to another job",
            "; ".join(found),
            f"use what it was begun with; {ANEW}",
        )
    return old


def _checked(
    input: str,
    model: ServedModel,
    defaults: SamplingDefaults,
    made_of: dict[str, Any],
    key: bytes,
    skip_bad: bool,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    started = time.monotonic()
    checked = check_lines(input, model, defaults, key)
    if not checked.n_lines:
        raise UserError(
            f"--input {input} holds no lines", "it is empty", "write one request a line"
        )
    for number, said in checked.shown:
        tell(f"bad line {number}: {said}")
    if checked.n_bad > len(checked.shown):
        tell(f"and {checked.n_bad - len(checked.shown)} more bad lines")
    if checked.n_bad and not skip_bad:
        found = f"{checked.n_bad} of {checked.n_lines}, from line {checked.shown[0][0]} on"
        raise UserError(
            f"--input {input} has bad lines",
            found,
            "correct them, or write errors in their place with --skip_bad",
        )
    tell(f"checked {checked.n_lines} lines in {time.monotonic() - started:.1f} s")
    return {
        "format": 1,
        "made_of": made_of,
        "n_lines": checked.n_lines,
        "n_bad": checked.n_bad,
        "duplicates": sorted(checked.duplicates),
    }


def _state(path: str) -> tuple[int, ...]:
    """What differs as soon as a file is written to or replaced; () for one that is gone."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return ()


def _file_digest(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while data := f.read(1 << 20):
                digest.update(data)
        return digest.hexdigest()
    except OSError as error:
        raise UserError(
            f"--input {path} cannot be read", str(error.strerror), "name a file of JSON lines"
        ) from None


def sampled_digest(folder: str, names: list[str], state: bytes) -> str:
    """A digest of `state` and of samples from the files called `names`: tells two models of one
    shape apart without reading all of them."""
    digest = hashlib.sha256(state)
    for name in sorted(names):
        path = os.path.join(folder, name)
        size = os.path.getsize(path)
        with open(open_regular(path), "rb") as f:
            for i in range(SAMPLES):
                f.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def tokenizer_digest(model: ServedModel) -> str:
    """A digest of what the tokenizer does: which ids, with which bytes, begin and end where."""
    tokenizer = model.tokenizer
    around = [tokenizer.encode(text, bos=True) for text in ("", "a")]
    digest = hashlib.sha256(repr((tokenizer.specials, around, tokenizer.stop_ids)).encode())
    for i in range(tokenizer.n_vocab):
        data = tokenizer.token_bytes(i)
        digest.update(len(data).to_bytes(4, "little") + data)
    return digest.hexdigest()
