"""Command: measured numbers beside the machine's ceiling. A card, a table, and the same as JSON in
the last line."""

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llama_tp.arch.config import check_launch
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import EngineOptions, Help, Without
from llama_tp.arch.published import PUBLISHED
from llama_tp.benchmarks.table import markdown
from llama_tp.cli import check_can_be_written, run

# Options that a benchmark decides itself, or that a model with random weights has no use for.
DECIDED = (
    "tokenizer_path",
    "max_seq_len",
    "seed",
    "rope_factor",
    "chat_template",
    "max_step_tokens",
    "prefix_cache",
    "step_timeout",
    "load_timeout",
    "quiet",
)


@dataclass(frozen=True)
class BenchOptions(EngineOptions):
    """A benchmark needs no checkpoint: --model gives random weights."""

    ckpt_dir: Annotated[str, Help("Model", "a checkpoint in either layout")] = ""


def main(
    what: Literal["latency", "throughput", "startup", "serve"],
    *,
    options: Annotated[BenchOptions, Without(DECIDED)],
    model: str | None = None,
    n_layers: int | None = None,
    tp: int | None = None,
    simulate_rank: int | None = None,
    allreduce_us: float | None = None,
    batch_size: tuple[int, ...] = (),
    input_len: int = 128,
    output_len: int = 128,
    n_runs: int = 3,
    n_requests: int = 32,
    spread: float = 0.5,
    save: str | None = None,
    plot: str | None = None,
    beside: tuple[str, ...] = (),
    url: str | None = None,
    chat: bool = False,
    request_rate: float | None = None,
    concurrency: int | None = None,
    prompts_file: str | None = None,
    temperature: float = 0.0,
    ignore_eos: bool = True,
    seed: int = 1,
    api_key: str | None = None,
    goodput: tuple[str, ...] = (),
    request_timeout: float = 600.0,
) -> None:
    """Measure latency, throughput or startup, on one rank or more, beside what the machine could do
    at best; or load a server.

    Examples:
        python -m llama_tp.bench latency --ckpt_dir checkpoints/demo --batch_size 1 --batch_size 8
        python -m llama_tp.launch --nproc_per_node 2 bench throughput --model 1B
        python -m llama_tp.bench serve --url http://127.0.0.1:8000 --n_requests 100 \\
            --request_rate 5 --goodput ttft:500

    What:
        what: latency of one batch at a time, throughput of many requests of different lengths,
            startup, or serve: a load on any OpenAI-compatible server

    Model:
        model: or random weights in a published size: 1B, 3B, 8B, 70B or 405B; for serve, the model
            to ask the server for, its first unless given
        n_layers: keep so many of that model's layers
        dtype: bfloat16, float16 or float32; as stored, or bfloat16, unless given

    Load:
        batch_size: sequences at once, for latency; 1, 4 and 16 unless given
        input_len: tokens of a prompt
        output_len: new tokens
        n_runs: runs of each batch size that count, after one that does not
        n_requests: requests at once, for throughput; in all, for serve
        spread: lengths of these lie within +- this part of input_len and output_len
        max_batch_size: most sequences computed at once

    A server, with serve:
        url: its address, with or without /v1
        chat: send chat messages instead of plain prompts
        request_rate: requests a second, at random moments (Poisson); all at once unless given
        concurrency: most requests under way at once
        prompts_file: one prompt a line, or {"prompt": "..."}; random words of input_len tokens
            unless given
        temperature: 0 is greedy
        ignore_eos: write output_len tokens whatever the model says, where the server knows the
            field ignore_eos
        seed: of prompts, lengths and moments
        api_key: OPENAI_API_KEY from the environment unless given
        goodput: NAME:MS counts requests that keep this limit, too; NAME is ttft, tpot, itl or e2el
        request_timeout: seconds without a byte after which a request has failed

    One rank of many, with --model, alone on this device:
        tp: how many ranks there would be
        simulate_rank: which of them to be; all hold equal shares
        allreduce_us: microseconds that one all-reduce would take, for the prediction

    Output:
        save: also write the JSON to this file
        plot: draw latency, or a server's requests, into this PNG or SVG
        beside: files of --save from other runs, drawn into the same picture
    """
    check_files(save, plot, beside)
    if what == "serve":
        if not url or options.ckpt_dir:
            raise UserError(
                "serve measures a server that runs",
                f"found {'--ckpt_dir' if options.ckpt_dir else 'no --url'}",
                "start one with python -m llama_tp.serve and give --url http://127.0.0.1:8000",
            )
        from llama_tp.benchmarks import serve, served

        requests = serve.Load(
            url,
            model,
            chat,
            n_requests,
            input_len,
            output_len,
            spread,
            request_rate,
            concurrency,
            prompts_file,
            temperature,
            ignore_eos,
            seed,
            api_key or os.environ.get("OPENAI_API_KEY"),
            serve.limits_of(goodput),
            request_timeout,
        )
        result = serve.measure(requests, show=lambda text: print(text, file=sys.stderr, flush=True))
        _show(served.tables(result), served.summary(result))
        _keep(result, save)
        if plot:
            served.draw(result, plot)
        return
    if url:
        raise UserError(
            "--url is for serve", f"this is {what}", f"python -m llama_tp.bench serve --url {url}"
        )
    if bool(options.ckpt_dir) == bool(model):
        found = "both --ckpt_dir and --model" if model else "neither --ckpt_dir nor --model"
        raise UserError(
            "there must be one model to measure",
            found,
            "give --ckpt_dir D, or --model 1B for random weights",
        )
    if model is not None and model not in PUBLISHED:
        raise UserError(
            "--model is not a published size",
            f"found {model!r}",
            f"use one of {', '.join(PUBLISHED)}",
        )
    is_rank = simulate_rank is not None and tp is not None and 0 <= simulate_rank < tp
    if (tp is not None or simulate_rank is not None) and not (model and is_rank):
        raise UserError(
            "--tp and --simulate_rank go together, with --model",
            f"found --tp {tp} --simulate_rank {simulate_rank}",
            "for example --model 405B --tp 8 --simulate_rank 0; real ranks are started with python "
            "-m llama_tp.launch",
        )
    if plot and what != "latency":
        raise UserError("--plot draws latency", f"this is {what}", "leave it out")
    if what == "startup" and not options.ckpt_dir:
        raise UserError("startup is loading a checkpoint", "found --model", "give --ckpt_dir")
    if options.ckpt_dir:
        check_launch(options.ckpt_dir, int(os.environ.get("WORLD_SIZE", 1)))

    from llama_tp.benchmarks import plot as plots
    from llama_tp.benchmarks import session

    load = session.Load(
        what,
        batch_size or (1, 4, 16),
        input_len,
        output_len,
        n_runs,
        n_requests,
        spread,
        options.max_batch_size,
    )
    engine, ages_s = session.open_engine(load, options, model, n_layers, tp)
    try:
        measured, tables = session.measure(
            engine,
            ages_s,
            load,
            model or options.ckpt_dir,
            allreduce_us,
            show=lambda text: print(text, flush=True),
        )
    except UserError as error:
        engine.watch.fail(error)
    if measured is not None:  # on the driver
        _show(tables, measured)
        _keep(measured, save)
        if plot:
            plots.draw([*(json.loads(Path(path).read_bytes()) for path in beside), measured], plot)
    engine.close()


def check_files(save: str | None, plot: str | None, beside: tuple[str, ...]) -> None:
    """Raises UserError, before anything is measured, for files that cannot be what they have to be
    afterwards."""
    for name, path in (("save", save), ("plot", plot)):
        if path:
            check_can_be_written(name, path)
    if plot and not plot.endswith((".png", ".svg")):
        raise UserError("--plot draws a .png or .svg", f"found {plot!r}", "name one")
    if plot and not importlib.util.find_spec("matplotlib"):
        raise UserError(
            "--plot needs matplotlib", "it is not installed", "pip install 'llama_tp[bench]'"
        )
    for path in beside:
        try:
            json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"--beside {path} cannot be read", str(error)[:200], "name a file that --save wrote"
            ) from None


def _show(tables: list[list[dict[str, Any]]], result: dict[str, Any]) -> None:
    for table in tables:
        print("\n" + markdown(table))
    print("\n" + json.dumps(result))


def _keep(result: dict[str, Any], save: str | None) -> None:
    if save:
        with open(save, "w") as f:
            json.dump(result, f)


if __name__ == "__main__":
    run(main)
