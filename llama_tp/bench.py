"""Command: measured numbers beside the machine's ceiling. A card, a table, and the same as JSON in the last line."""

import json
import os
from typing import Literal

from llama_tp.cli import run
from llama_tp.spec.config import check_launch
from llama_tp.spec.errors import UserError
from llama_tp.spec.published import PUBLISHED


def main(
    what: Literal["latency", "throughput", "startup"], *, ckpt_dir: str | None = None, model: str | None = None,
    n_layers: int | None = None, tp: int | None = None, simulate_rank: int | None = None, allreduce_us: float | None = None,
    batch_size: tuple[int, ...] = (), input_len: int = 128, output_len: int = 128, n_runs: int = 3, n_requests: int = 32,
    spread: float = 0.5, max_batch_size: int = 32, device: str | None = None, dtype: str | None = None,
    deterministic: bool | None = None, save: str | None = None, plot: str | None = None, beside: tuple[str, ...] = (),
):
    """Measure latency, throughput or startup, also under torchrun, beside what the machine could do at best.

    Examples:
        python -m llama_tp.bench latency --ckpt_dir checkpoints/demo --batch_size 1 --batch_size 8
        torchrun --nproc_per_node 2 -m llama_tp.bench throughput --model 1B

    What:
        what: latency of one batch at a time, throughput of many requests of different lengths, or startup

    Model:
        ckpt_dir: a checkpoint in either layout
        model: or random weights in a published size: 1B, 3B, 8B, 70B or 405B
        n_layers: keep so many of that model's layers
        dtype: bfloat16, float16 or float32; as stored, or bfloat16, unless given
        device: cpu or cuda; what is there unless given
        deterministic: as generate's

    Load:
        batch_size: sequences at once, for latency; 1, 4 and 16 unless given
        input_len: tokens of a prompt
        output_len: new tokens
        n_runs: runs of each batch size that count, after one that does not
        n_requests: requests at once, for throughput
        spread: lengths of these lie within +- this part of input_len and output_len
        max_batch_size: most sequences computed at once

    One rank of many, with --model, alone on this device:
        tp: how many ranks there would be
        simulate_rank: which of them to be; all hold equal shares
        allreduce_us: microseconds that one all-reduce would take, for the prediction

    Output:
        save: also write the JSON to this file
        plot: draw latency into this PNG or SVG
        beside: files of --save from other runs, drawn into the same picture
    """
    if (ckpt_dir is None) == (model is None):
        found = "both --ckpt_dir and --model" if model else "neither --ckpt_dir nor --model"
        raise UserError("there must be one model to measure", found, "give --ckpt_dir D, or --model 1B for random weights")
    if model is not None and model not in PUBLISHED:
        raise UserError("--model is not a published size", f"found {model!r}", f"use one of {', '.join(PUBLISHED)}")
    if (tp is None) != (simulate_rank is None) or (tp and not (model and 0 <= simulate_rank < tp)):
        raise UserError("--tp and --simulate_rank go together, with --model", f"found --tp {tp} --simulate_rank {simulate_rank}",
                        "for example --model 405B --tp 8 --simulate_rank 0; real ranks are started with torchrun")
    if plot and what != "latency":
        raise UserError("--plot draws latency", f"this is {what}", "leave it out")
    if what == "startup" and not ckpt_dir:
        raise UserError("startup is loading a checkpoint", "found --model", "give --ckpt_dir")
    if ckpt_dir:
        check_launch(ckpt_dir, int(os.environ.get("WORLD_SIZE", 1)))

    from llama_tp.benchmarks import plot as plots
    from llama_tp.benchmarks import session
    from llama_tp.benchmarks.table import markdown
    load = session.Load(what, batch_size or (1, 4, 16), input_len, output_len, n_runs, n_requests, spread, max_batch_size)
    engine, ages_s = session.open_engine(load, ckpt_dir, model, n_layers, tp, device, dtype, deterministic)
    try:
        result, tables = session.measure(engine, ages_s, load, ckpt_dir or model, allreduce_us,
                                         show=lambda text: print(text, flush=True))
    except UserError as error:
        engine.watch.fail(error)
    if engine.is_driver:
        for table in tables:
            print("\n" + markdown(table))
        print("\n" + json.dumps(result))
        if save:
            with open(save, "w") as f:
                json.dump(result, f)
        if plot:
            others = [json.load(open(path)) for path in beside]
            plots.draw([*others, result], plot)
    engine.close()


if __name__ == "__main__":
    run(main)
