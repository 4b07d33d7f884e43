"""Many requests at once, of different lengths: what a batch job or a busy server sees."""

import random
import time
from typing import Any

from llama_tp.benchmarks.ceiling import Ceiling
from llama_tp.benchmarks.latency import step
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request, SamplingParams

HEADER = [
    "requests",
    "prompt tokens",
    "new tokens",
    "seconds",
    "requests/s",
    "output tok/s",
    "total tok/s",
    "of floor",
]


def requests_of(
    engine: Engine, n: int, n_prompt: int, n_new: int, spread: float, name: str
) -> list[Request]:
    """n greedy requests whose lengths lie evenly within +- spread of n_prompt and n_new; the same
    ones every time."""
    draw, vocab = random.Random(1), engine.runner.n_vocab

    def length(middle: int) -> int:
        return max(1, round(middle * draw.uniform(1 - spread, 1 + spread)))

    return [
        Request(
            f"{name}-{i}",
            [draw.randrange(vocab) for _ in range(length(n_prompt))],
            SamplingParams(max_tokens=length(n_new), temperature=0, ignore_eos=True),
        )
        for i in range(n)
    ]


def throughput(
    engine: Engine,
    ceiling: Ceiling,
    n: int,
    n_prompt: int,
    n_new: int,
    spread: float,
    max_rows: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Driver: -> (table row under HEADER, JSON with vllm bench throughput's keys)."""
    requests = requests_of(engine, n, n_prompt, n_new, spread, "run")
    for request in requests_of(engine, min(4, n), 32, 4, 0, "warm-up"):
        engine.submit(request)
    while engine.has_work:
        step(engine)
    started = time.perf_counter()
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        step(engine)
    seconds = time.perf_counter() - started
    n_in, n_out = (
        sum(len(r.prompt_ids) for r in requests),
        sum(r.params.max_tokens or 0 for r in requests),
    )
    # At best: all prompts at the matrix rate, and all new tokens in full batches.
    floor_s = ceiling.prefill_s(n_in) + n_out / min(n, max_rows) * ceiling.decode_s(
        min(n, max_rows), n_prompt + n_new // 2
    )
    row = dict(
        zip(
            HEADER,
            [
                n,
                n_in,
                n_out,
                f"{seconds:.2f}",
                f"{n / seconds:.2f}",
                f"{n_out / seconds:.1f}",
                f"{(n_in + n_out) / seconds:.1f}",
                f"{floor_s / seconds:.0%}",
            ],
        )
    )
    return [row], {
        "elapsed_time": seconds,
        "num_requests": n,
        "total_num_tokens": n_in + n_out,
        "requests_per_second": n / seconds,
        "tokens_per_second": (n_in + n_out) / seconds,
        "output_throughput": n_out / seconds,
        "floor_s": floor_s,
    }
