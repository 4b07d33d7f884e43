"""How long prompts take: for each batch size the time to the first token and the time of each
further one."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.benchmarks.ceiling import Ceiling
from llama_tp.engine.delta import Delta
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request, SamplingParams

HEADER = [
    "batch",
    "prompt",
    "new",
    "TTFT ms",
    "prefill tok/s",
    "prefill % of limit",
    "TPOT ms",
    "spread",
    "decode tok/s",
    "GB/s a rank",
    "decode % of limit",
    "driver ms",
]


@dataclass(frozen=True)
class Times:
    """One run of a batch: seconds to the last sequence's first token, of each later step, in all,
    and the driver's own part of a step."""

    first_s: float
    steps_s: list[float]
    all_s: float
    driver_s: float


def batch_of(engine: Engine, n: int, n_prompt: int, n_new: int, name: str) -> list[Request]:
    """n greedy requests with different prompts and exactly n_new tokens each."""
    params = SamplingParams(max_tokens=n_new, temperature=0, ignore_eos=True)
    vocab = engine.runner.n_vocab
    return [
        Request(f"{name}-{i}", [(7 * j + 131 * i + 11) % vocab for j in range(n_prompt)], params)
        for i in range(n)
    ]


def step(engine: Engine) -> list[Delta]:
    """Driver: the engine's next step. Raises UserError for a sequence that was given up, whose
    tokens would be counted as made."""
    deltas = engine.step()
    for delta in deltas:
        if delta.error:
            raise UserError("this model cannot be measured", delta.error)
    return deltas


def run(engine: Engine, requests: list[Request]) -> Times:
    """Driver: runs the requests to their end, all handed over at once."""
    before, started = (engine.stats.driver_s, engine.n_steps), time.perf_counter()
    for request in requests:
        engine.submit(request)
    waiting, first_s, steps_s = {request.id for request in requests}, 0.0, []
    while engine.has_work:
        step_started = time.perf_counter()
        deltas = step(engine)
        now = time.perf_counter()
        if waiting:
            waiting -= {delta.request_id for delta in deltas}
            first_s = now - started
        else:
            steps_s.append(now - step_started)
    n_steps = engine.n_steps - before[1]
    return Times(
        first_s,
        steps_s,
        time.perf_counter() - started,
        (engine.stats.driver_s - before[0]) / max(1, n_steps),
    )


def latency(
    engine: Engine, ceiling: Ceiling, batches: list[int], n_prompt: int, n_new: int, n_runs: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Driver: -> (table rows under HEADER, JSON). One warm-up run a batch size does not count."""
    rows, results = [], []
    for batch in batches:
        runs = [
            run(engine, batch_of(engine, batch, n_prompt, n_new, f"{batch}-{i}"))
            for i in range(n_runs + 1)
        ][1:]
        first_s = statistics.median(each.first_s for each in runs)
        medians = [statistics.median(each.steps_s) for each in runs if each.steps_s]
        step_s = statistics.median(medians) if medians else float("nan")
        spread = (max(medians) - min(medians)) / step_s if medians else float("nan")
        driver_s = statistics.median(each.driver_s for each in runs)
        context = n_prompt + n_new // 2
        floor_first, floor_step = (
            ceiling.prefill_s(batch * n_prompt),
            ceiling.decode_s(batch, context),
        )
        n_bytes = ceiling.weight_bytes_per_step + batch * context * ceiling.kv_bytes_per_position
        rows.append(
            dict(
                zip(
                    HEADER,
                    [
                        batch,
                        n_prompt,
                        n_new,
                        f"{1e3 * first_s:.1f}",
                        f"{batch * n_prompt / first_s:.0f}",
                        f"{floor_first / first_s:.0%}",
                        f"{1e3 * step_s:.2f}",
                        f"{spread:.0%}",
                        f"{batch / step_s:.1f}",
                        f"{n_bytes / step_s / 1e9:.1f}",
                        f"{floor_step / step_s:.0%}",
                        f"{1e3 * driver_s:.2f}",
                    ],
                )
            )
        )
        results.append(
            {
                "batch_size": batch,
                "input_len": n_prompt,
                "output_len": n_new,
                "avg_latency": statistics.mean(r.all_s for r in runs),
                "latencies": [each.all_s for each in runs],
                "median_ttft_ms": 1e3 * first_s,
                "median_tpot_ms": 1e3 * step_s,
                "output_throughput": batch / step_s,
                "floor_ttft_ms": 1e3 * floor_first,
                "floor_tpot_ms": 1e3 * floor_step,
                "driver_ms_per_step": 1e3 * driver_s,
            }
        )
    return rows, {"runs": results}
