"""What the clients of a server saw -> the numbers of `vllm bench serve`, tables and a picture.
Knows no http."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_tp.arch.errors import UserError

KINDS = ("ttft", "tpot", "itl", "e2el")
DETAILS = (
    "input_lens",
    "output_lens",
    "ttfts",
    "itls",
    "latencies",
    "start_times",
    "queue_times",
    "generated_texts",
    "errors",
)


@dataclass
class Outcome:
    """One request: times in seconds, `start` since the beginning of the load, `queue` from its turn
    to its sending."""

    start: float = 0.0
    queue: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    text: str = ""
    n_input: int = 0
    n_output: int = 0
    error: str = ""

    @property
    def tpot(self) -> float | None:
        return (self.latency - self.ttft) / (self.n_output - 1) if self.n_output > 1 else None


def result_of(
    outcomes: Sequence[Outcome], duration: float, goodput: Mapping[str, float]
) -> dict[str, Any]:
    """The keys of `vllm bench serve --save-result --save-detailed`. The lists (DETAILS) have an
    entry a request, failed ones too; the other numbers are of those that did not fail. `goodput`
    has limits in ms; without any, request_goodput is None."""
    good = [one for one in outcomes if not one.error]
    n_input, n_output = sum(one.n_input for one in good), sum(one.n_output for one in good)
    result = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": n_input,
        "total_output_tokens": n_output,
        "request_throughput": len(good) / duration,
        "request_goodput": sum(_meets(one, goodput) for one in good) / duration
        if goodput
        else None,
        "output_throughput": n_output / duration,
        "total_token_throughput": (n_input + n_output) / duration,
        "max_output_tokens_per_s": _peak_rate(good),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    for kind in KINDS:
        result |= {
            f"{name}_{kind}_ms": value for name, value in _summary(_times(good, kind)).items()
        }
    return result | {
        "input_lens": [one.n_input for one in outcomes],
        "output_lens": [one.n_output for one in outcomes],
        "ttfts": [one.ttft for one in outcomes],
        "itls": [one.itls for one in outcomes],
        "latencies": [one.latency for one in outcomes],
        "start_times": [one.start for one in outcomes],
        "queue_times": [one.queue for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error for one in outcomes],
    }


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without its lists."""
    return {key: value for key, value in result.items() if key not in DETAILS}


def tables(result: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Rows for two tables: the counts, and the times in ms."""
    counts = {
        "requests": result["completed"],
        "failed": result["failed"],
        "s": f"{result['duration']:.2f}",
        "input tokens": result["total_input_tokens"],
        "output tokens": result["total_output_tokens"],
        "requests / s": f"{result['request_throughput']:.2f}",
        "output tok / s": f"{result['output_throughput']:.1f}",
        "all tok / s": f"{result['total_token_throughput']:.1f}",
        "peak output tok / s": result["max_output_tokens_per_s"],
        "peak requests": result["max_concurrent_requests"],
    }
    if result["request_goodput"] is not None:
        counts["good requests / s"] = f"{result['request_goodput']:.2f}"
    times = [
        {"ms": kind.upper()}
        | {name: f"{result[f'{name}_{kind}_ms']:.2f}" for name in ("mean", "median", "p99", "std")}
        for kind in KINDS
    ]
    return [[counts], times]


def draw(result: Mapping[str, Any], path: str) -> None:
    """Draws a result into a PNG or SVG: every request as a bar, and how the times are spread.
    UserError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError(
            "--plot needs matplotlib", "it is not installed", "pip install 'llama_tp[bench]'"
        ) from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    rows = [
        row
        for row in zip(
            result["start_times"], result["ttfts"], result["latencies"], result["errors"]
        )
        if not row[3]
    ]
    starts, ttfts, ends = ([row[i] for row in rows] for i in range(3))
    firsts, rests = [a + b for a, b in zip(starts, ttfts)], [b - a for a, b in zip(ttfts, ends)]
    left.barh(
        range(len(rows)), ttfts, left=starts, height=1, color="C1", label="to the first token"
    )
    left.barh(range(len(rows)), rests, left=firsts, height=1, color="C0", label="tokens")
    left.set(title="requests", xlabel="s", ylabel="request")
    left.invert_yaxis()
    left.legend()
    for kind, values in (
        ("TTFT", ttfts),
        ("ITL", [gap for gaps in result["itls"] for gap in gaps]),
    ):
        ordered = sorted(1e3 * value for value in values)
        right.plot(
            ordered,
            [(i + 1) / len(ordered) for i in range(len(ordered))],
            drawstyle="steps-post",
            label=kind,
        )
    right.set(title="how many are faster", xlabel="ms", ylabel="part", xscale="log", ylim=(0, 1.02))
    right.grid(alpha=0.3)
    right.legend()
    figure.suptitle(
        f"{result['model_id']}: {result['completed']} requests, {result['output_throughput']:.0f} "
        "output tokens / s",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _times(outcomes: Sequence[Outcome], kind: str) -> list[float]:
    """Seconds."""
    if kind == "itl":
        return [gap for one in outcomes for gap in one.itls]
    return [value for one in outcomes if (value := _time(one, kind)) is not None]


def _time(one: Outcome, kind: str) -> float | None:
    return {"ttft": one.ttft, "tpot": one.tpot, "e2el": one.latency}[kind]


def _summary(times: Sequence[float]) -> dict[str, float]:
    """Milliseconds; 0 where there is nothing to measure, as vLLM has it."""
    ms = [1e3 * value for value in times] or [0.0]
    return {
        "mean": statistics.fmean(ms),
        "median": statistics.median(ms),
        "std": statistics.pstdev(ms),
        "p99": percentile(ms, 99),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """With linear interpolation, as numpy does it. `values` must not be empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _meets(one: Outcome, goodput: Mapping[str, float]) -> bool:
    """Whether a request keeps all limits; its mean gap stands for itl, and one token has no gap."""
    times = {
        "ttft": one.ttft,
        "tpot": one.tpot or 0.0,
        "itl": statistics.fmean(one.itls or [0.0]),
        "e2el": one.latency,
    }
    return all(1e3 * times[kind] <= ms for kind, ms in goodput.items())


def _peak_rate(outcomes: Sequence[Outcome]) -> int:
    """Most pieces of text that came within one second of the load's clock."""
    seconds: Counter[int] = Counter()
    for one in outcomes:
        moment = one.start + one.ttft
        for gap in [0.0, *one.itls]:
            moment += gap
            seconds[int(moment)] += 1
    return max(seconds.values(), default=0)


def _peak_concurrency(outcomes: Sequence[Outcome]) -> int:
    events = sorted(
        [(one.start, 1) for one in outcomes] + [(one.start + one.latency, -1) for one in outcomes]
    )
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most
