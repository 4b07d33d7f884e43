"""Command: answers a file of requests. A job that is killed and run again ends with the same file.

Rank 0 reads the input and writes the output. Before any model is loaded it decides whether lines
are left; the other ranks wait for that decision in the launch's store, and then follow its steps.
"""

import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import FrameType
from typing import Annotated, Any, Protocol

from tqdm import tqdm

from llama_tp.arch.config import ModelConfig, check_launch
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import DEFAULT_SEQ_LEN, EngineOptions, Help
from llama_tp.batch_job.job import Job, open_job, sampled_digest, tokenizer_digest
from llama_tp.batch_job.work import Engine, Work
from llama_tp.cli import check_can_be_written, flags_of, run
from llama_tp.protocol.defaults import SamplingDefaults, generation_config_of, sampling_flags
from llama_tp.protocol.order import ServedModel
from llama_tp.text.template import ChatTemplate, open_template
from llama_tp.text.token_table import Tokenizer
from llama_tp.text.tokenizer import check_vocab, open_tokenizer

LINE_EVERY_S = 10.0  # how often the state is printed where there is no terminal for a bar
GO_KEY = "llama_tp/batch"  # key in the launch's store
PARAMETERS = (
    "temperature",
    "top_p",
    "max_gen_len",
    "seed",
    "dtype",
    "deterministic",
    "rope_factor",
    "chat_template",
)  # what answers depend on
# of any job: Llama's own templates say so where they know no date
TEMPLATES_DATE = datetime(2024, 7, 26)
# workers wait while rank 0 looks through the input, however long that takes
STORE_WAIT = timedelta(days=365)


@dataclass(frozen=True)
class BatchOptions(EngineOptions):
    """A batch is deterministic on every device, unless it is asked not to be."""

    deterministic: Annotated[
        bool,
        Help(
            "Model",
            "the same answers however often the job is interrupted, and at tp 1, 2, 4 and 8; a CPU "
            "keeps that to the bit, on CUDA other company in a batch can still change low bits; "
            "without it answers may differ after an interruption",
        ),
    ] = True


def main(
    *,
    options: BatchOptions,
    input: str,
    output: str,
    skip_bad: bool = False,
    retry_failed: bool = False,
    temperature: float | None = None,
    top_p: float | None = None,
    max_gen_len: int | None = None,
    generation_config: str = "auto",
    model_name: str | None = None,
) -> None:
    """Answer a file of requests. The same command goes on where it was stopped, killed or out of
    disk.

    Examples:
        python -m llama_tp.batch --ckpt_dir checkpoints/demo --input in.jsonl --output out.jsonl
        python -m llama_tp.launch --nproc_per_node 8 batch \\
            --ckpt_dir Meta-Llama-3-70B-Instruct/original --input in.jsonl --output out.jsonl

    An input line is one of OpenAI's batch ({"custom_id", "method", "url", "body"}, for
    /v1/chat/completions or /v1/completions), or plain: {"prompt": "..."} or {"messages": [...]},
    with any other field of such a body beside it. Output lines are OpenAI's, in the input's order.
    OUTPUT.job, beside the output, says what it was made of.

    Files:
        input: the requests, one JSON object a line
        output: where the answers go; what is there already is kept and gone on from
        skip_bad: write an error in the place of lines that cannot be run, instead of refusing the
            file
        retry_failed: run the lines again that have failed, and put their new answers in their
            places

    Model:
        model_name: what the answers call the model; the name of ckpt_dir unless given
        chat_template: meta for the Llama 3 chat format, hf for the template that the checkpoint's
            folder brings; one that asks for the date is told 26 Jul 2024, what Llama's own
            templates say, so that a job is the same on any day

    Sampling, for lines that do not say it themselves:
        temperature: 0 is greedy; unless given what generation_config says, else 1 for OpenAI's
            lines and 0.6 for plain ones
        top_p: unless given what generation_config says, else 1 for OpenAI's lines and 0.9 for plain
            ones
        max_gen_len: most tokens to write; unless given 16 for OpenAI's completions, else what
            generation_config says, else as many as fit in max_seq_len
        generation_config: auto for the generation_config.json of ckpt_dir, if there is one (its
            temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens count); a path
            for another; none for neither
        seed: with the input and a line's custom_id, decides the line's draws
    """
    flags = dict(locals())
    flags |= vars(flags.pop("options"))
    check_files(input, output)
    given = sampling_flags(temperature=temperature, top_p=top_p, max_tokens=max_gen_len)
    check_launch(options.ckpt_dir, int(os.environ.get("WORLD_SIZE", 1)))

    from llama_tp.checkpoint.hub import fetch
    from llama_tp.checkpoint.source import open_checkpoint
    from llama_tp.engine.build import build
    from llama_tp.engine.session import report
    from llama_tp.parallel.rendezvous import open_store, read_launch

    launch, store = read_launch(os.environ), None
    if launch is not None and launch.world > 1:
        store = open_store(launch, options.load_timeout)
    job: Job | None = None
    if launch is None or launch.rank == 0:
        source = open_checkpoint(fetch(options.ckpt_dir), options.rope_factor)
        tokenizer = open_tokenizer(options.tokenizer_path, source.folder)
        folder = fetch(options.ckpt_dir, cached_only=True)
        chat = None
        if options.chat_template == "hf":
            chat = open_template(folder, tokenizer, TEMPLATES_DATE)
        model = served(source.config, tokenizer, chat, options, model_name)
        weights = sampled_digest(source.folder, source.weight_files(), source.digest())
        defaults = SamplingDefaults(generation_config_of(folder, generation_config), given)

        def tell(line: str) -> None:
            if not options.quiet:
                print(f"batch: {line}", file=sys.stderr, flush=True)

        if defaults.file:
            tell(f"what lines do not say: {defaults}")
        job = open_job(
            input,
            output,
            model,
            defaults,
            made_of(weights, model, defaults, flags),
            skip_bad,
            retry_failed,
            tell,
        )
        source.close()
    if not something_to_do(job, store):
        return say_finished(job, options.quiet)

    engine = build(options, store)
    stop, finished = Stop(engine.is_driver), True
    try:
        if job is None:
            engine.follow()
        else:
            dtype = str(engine.runner.model.dtype).removeprefix("torch.")
            job.computed_by({"device": engine.ranks.device.type, "dtype": dtype})
            finished = work(job, engine, options.max_batch_size, stop, options.quiet)
            engine.dismiss()
        report(engine, options.quiet)
    except UserError as error:
        engine.watch.fail(error)
    engine.close()
    if job and stop.signal and not finished:
        launched = None if launch is None else (launch.n_nodes, launch.local_size)
        command = resume_command(flags, launched)
        print(
            f"batch: stopped by {stop.signal.name} after {job.target.n_lines} of {job.n_lines} "
            f"lines; to go on: {command}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(128 + stop.signal)
    say_finished(job, options.quiet)


def check_files(input: str, output: str) -> None:
    """Raises UserError for files that cannot be what they have to be."""
    if not os.path.isfile(input):
        raise UserError(
            f"--input {input} cannot be read",
            "there is no such file",
            "name a file (it is read twice, so no pipe)",
        )
    check_can_be_written("output", output)
    if os.path.exists(output) and not os.path.isfile(output):
        raise UserError(
            f"--output {output} cannot be written",
            "it is no file that can be gone on with",
            "name another",
        )
    if any(
        os.path.exists(each) and os.path.samefile(input, each)
        for each in (output, f"{output}.job", f"{output}.retry")
    ):
        raise UserError(
            f"--output {output} cannot be written",
            "it is the --input, or a file beside it is",
            "name another",
        )


def served(
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    options: EngineOptions,
    model_name: str | None,
) -> ServedModel:
    """What the input's lines are held against; `chat` is the folder's template, if that is
    used."""
    check_vocab(tokenizer, config.vocab_size)
    name = model_name or os.path.basename(os.path.abspath(options.ckpt_dir))
    max_seq_len = min(options.max_seq_len or DEFAULT_SEQ_LEN, config.max_context)
    n_vocab = min(tokenizer.n_vocab, config.vocab_size)
    return ServedModel(name, tokenizer, max_seq_len, n_vocab, chat=chat)


def made_of(
    weights: str, model: ServedModel, defaults: SamplingDefaults, flags: dict[str, Any]
) -> dict[str, Any]:
    """What answers depend on: a job goes on only if all of it is the same. tp is not part of it.
    `weights` is a digest of the checkpoint."""
    template: dict[str, Any] = {}
    if isinstance(model.chat, ChatTemplate):
        template = {"chat template": model.chat.digest()}
    config = {"generation config": dict(defaults.file)} if defaults.file else {}
    return {
        "model": weights,
        "tokenizer": tokenizer_digest(model),
        **template,
        **config,
        "parameters": {name: flags[name] for name in PARAMETERS}
        | {"model_name": model.name, "max_seq_len": model.max_seq_len},
    }


class Store(Protocol):
    """The part of torch's Store that is used here; this module does not import torch."""

    def set_timeout(self, timeout: timedelta, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def set(self, key: str, value: str, /) -> None: ...


def something_to_do(job: Job | None, store: Store | None) -> bool:
    """Whether any line is left. Rank 0 has the job and decides; the others wait for the decision in
    the launch's store, for hours if need be."""
    if job is None:
        assert store is not None, "a worker has a store"
        store.set_timeout(STORE_WAIT)
        try:
            return store.get(GO_KEY) == b"go"
        except RuntimeError as error:  # torch's network errors are RuntimeErrors
            said = str(error).split("\n")[0][:200]
            raise UserError(
                "rank 0 has ended before it gave the word to begin", said, "see its message"
            ) from None
    if job.is_done:
        job.finish()
    if store is not None:
        store.set(GO_KEY, "done" if job.is_done else "go")
    return not job.is_done


def work(job: Job, engine: Engine, n_rows: int, stop: "Stop", quiet: bool) -> bool:
    """Driver: the job's lines through the engine. -> whether all are written."""
    with Progress(job, quiet) as progress:
        return Work(job, engine, n_rows, f"fp_{job.key.hex()[:12]}", progress).run(
            lambda: stop.signal is not None
        )


class Stop:
    """The signal that asked this job to stop, if one did. The driver then ends after its step, and
    the workers when the driver tells them.

    Made on every rank after the engine. Until then a signal ends a rank at once, and nothing has
    been written.
    """

    def __init__(self, is_driver: bool):
        self.signal: signal.Signals | None = None
        if is_driver:
            signal.set_wakeup_fd(-1)  # the watch would end this rank 2 s after the signal
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._asked if is_driver else signal.SIG_IGN)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: now
            raise SystemExit(128 + number)
        self.signal = signal.Signals(number)


class Progress:
    """Lines, lines/s, tok/s and the time left: a bar on a terminal, a plain line now and then
    elsewhere."""

    def __init__(self, job: Job, quiet: bool):
        self.total, self.begun_at, self.quiet = job.n_lines, job.target.n_lines, quiet
        self.started = self.said_at = time.monotonic()
        self.n_tokens = 0
        on_terminal = not quiet and sys.stderr.isatty()
        self.bar = (
            tqdm(desc="batch", total=self.total, initial=self.begun_at, unit="line")
            if on_terminal
            else None
        )

    def __call__(self, n_lines: int, n_failed: int, n_tokens: int) -> None:
        self.n_tokens += n_tokens
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"{self.n_tokens / max(now - self.started, 1e-9):.0f} tok/s, {n_failed} failed",
                refresh=False,
            )
            self.bar.update(n_lines - self.bar.n)
        elif not self.quiet and (now - self.said_at >= LINE_EVERY_S or n_lines == self.total):
            self.said_at = now
            print(
                f"batch: {self.line(n_lines, n_failed, now - self.started)}",
                file=sys.stderr,
                flush=True,
            )

    def line(self, n_lines: int, n_failed: int, seconds: float) -> str:
        """The state in words."""
        rate = (n_lines - self.begun_at) / max(seconds, 1e-9)
        left = f", {timedelta(seconds=round((self.total - n_lines) / rate))} left" if rate else ""
        return (
            f"{n_lines} of {self.total} lines, {n_failed} failed, {rate:.1f} lines/s, "
            f"{self.n_tokens / max(seconds, 1e-9):.0f} tok/s{left}"
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def say_finished(job: Job | None, quiet: bool) -> None:
    """Rank 0: says that the output is complete. Raises UserError if any of its lines failed, in
    this run or an earlier one."""
    if job is None:
        return
    if job.n_failed:
        raise UserError(
            f"{job.n_failed} of {job.n_lines} lines failed",
            f'{job.output} is whole, and says why in their "error"',
            "--retry_failed runs them again",
        )
    if not quiet:
        print(f"batch: all {job.n_lines} lines are in {job.output}", file=sys.stderr, flush=True)


def resume_command(flags: dict[str, Any], launched: tuple[int, int] | None) -> str:
    """The command line that continues the job. `launched`: the number of machines and of ranks on
    each, if a launcher started them."""
    words = ["python", "-m", "llama_tp.batch"]
    if launched is not None:
        n_nodes, n_ranks = launched
        nodes = ["--nnodes", str(n_nodes), "..."] if n_nodes > 1 else []
        words[2:] = ["llama_tp.launch", *nodes, "--nproc_per_node", str(n_ranks), "batch"]
    for name, flag in flags_of(main).items():
        value = flags[name]
        if value != flag.default:
            words += (
                [f"--{name}" if value else f"--no_{name}"]
                if isinstance(value, bool)
                else [f"--{name}", str(value)]
            )
    return shlex.join(words)


if __name__ == "__main__":
    run(main)
