"""One benchmark from the engine to the result: what the bench command does on every rank."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama_tp.arch.memory import GIB, counted
from llama_tp.arch.options import EngineOptions
from llama_tp.arch.published import PUBLISHED
from llama_tp.benchmarks import latency, startup, synthetic, throughput
from llama_tp.benchmarks.ceiling import Ceiling, ceiling
from llama_tp.engine.build import build, pick_dtype, pick_mode
from llama_tp.engine.engine import Engine
from llama_tp.engine.session import peak_bytes
from llama_tp.parallel.collectives import gather_ints
from llama_tp.parallel.groups import Ranks, init_ranks, pick_device, single_rank
from llama_tp.parallel.health import Watch


@dataclass(frozen=True)
class Load:
    """What is measured; the names are the flags'."""

    what: str
    batches: tuple[int, ...]
    n_prompt: int
    n_new: int
    n_runs: int
    n_requests: int
    spread: float
    max_rows: int

    @property
    def n_positions(self) -> int:
        """The longest sequence that occurs."""
        return int((self.n_prompt + self.n_new) * (1 + self.spread)) + 2

    @property
    def rows(self) -> int:
        return max(self.batches) if self.what == "latency" else self.max_rows


def open_engine(
    load: Load, options: EngineOptions, model: str | None, n_layers: int | None, tp: int | None
) -> tuple[Engine, tuple[float, float]]:
    """A checkpoint's engine, or one with random weights; and the process's age before and after
    building it."""
    begun_s = startup.process_age_s()
    if model is None:
        engine = build(
            replace(
                options,
                max_seq_len=load.n_positions,
                max_batch_size=load.rows,
                prefix_cache=False,
            )
        )
    elif model is None:
        raise ValueError("neither a checkpoint nor a published size")
    else:
        config = synthetic.shrunk(PUBLISHED[model], n_layers)
        if tp:
            ranks = synthetic.simulated(tp, pick_device(options.device, 0))
        else:
            ranks = init_ranks(options.device)
        dtype = pick_dtype(options.dtype, torch.bfloat16, ranks.device)
        config.check_tp(ranks.tp)
        # a simulated rank has nobody to watch
        watch = Watch(single_rank(ranks.device) if tp else ranks)
        engine = synthetic.engine_of(
            config,
            ranks,
            dtype,
            load.n_positions,
            load.rows,
            pick_mode(options.deterministic, ranks.device, dtype),
            watch,
        )
    return engine, (begun_s, startup.process_age_s())


def measure(
    engine: Engine,
    ages_s: tuple[float, float],
    load: Load,
    name: str,
    allreduce_us: float | None,
    show: Callable[[str], None],
) -> tuple[dict[str, Any] | None, list[list[dict[str, Any]]]]:
    """Every rank calls it. -> on the driver (the JSON, tables to print); `show` gets the ceiling
    card before."""
    ranks, model = engine.ranks, engine.worker.model
    alone = isinstance(ranks.communicator, synthetic.FakeCommunicator)
    limits, peak_before = limits_and_peak(engine, alone)
    if not engine.is_driver:
        engine.follow()
        gather_ints(max(peak_before, peak_bytes(engine)), ranks)
        return None, []
    show(
        f"{name}, {counted(model.config.n_params)} parameters, {str(model.dtype)[6:]}, "
        + (f"ONE rank of tp {ranks.tp}, simulated" if alone else f"tp {ranks.tp}")
        + f", {torch.get_num_threads()} thread(s) a rank on {device_name(ranks)}, torch "
        f"{torch.__version__}, "
        f"{model.backends.name} kernels{', deterministic' if model.deterministic else ''}"
    )
    for why in model.backends.not_taken:
        show(why)
    show(limits.card())
    if load.what == "latency":
        rows, result = latency.latency(
            engine, limits, list(load.batches), load.n_prompt, load.n_new, load.n_runs
        )
    elif load.what == "throughput":
        rows, result = throughput.throughput(
            engine, limits, load.n_requests, load.n_prompt, load.n_new, load.spread, load.max_rows
        )
    else:
        files = [
            str(path)
            for path in sorted(Path(name).iterdir())
            if path.suffix in (".pth", ".safetensors") and path.is_file()
        ]
        rows, result = startup.startup(engine, files, *ages_s)
    tables = [rows]
    engine.dismiss()
    peak = max(peak_before, peak_bytes(engine))
    peaks = [peak] if alone else gather_ints(peak, ranks)
    result |= {
        "benchmark": load.what,
        "model": Path(name).name,
        "n_params": model.config.n_params,
        "tp": ranks.tp,
        "simulated": alone,
        "dtype": str(model.dtype)[6:],
        "deterministic": model.deterministic,
        "device": device_name(ranks),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "ceiling": limits.as_json(),
        "peak_memory_gib": [round(peak / GIB, 3) for peak in peaks],
    }
    if alone:
        tables += predicted(engine, result, allreduce_us)
    show(f"peak memory: {', '.join(f'{peak / GIB:.2f}' for peak in peaks)} GiB")
    return result, tables


def limits_and_peak(engine: Engine, alone: bool) -> tuple[Ceiling, int]:
    """The machine's limits, and the most bytes this rank had used before they were measured. A GPU
    forgets what that took."""
    model, device, peak = engine.worker.model, engine.ranks.device, peak_bytes(engine)
    limits = ceiling(model.shard, engine.ranks, model.dtype, together=not alone)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return limits, peak


def predicted(
    engine: Engine, result: dict[str, Any], allreduce_us: float | None
) -> list[list[dict[str, Any]]]:
    """Tables of a simulated rank: its messages, and the step's time with the sums that it did not
    wait for."""
    messages = synthetic.message_table(engine.ranks, engine.n_steps + 1)
    if allreduce_us is None:
        return [messages]
    n_sums = 2 * engine.worker.model.config.n_layers + 1
    rows = []
    for run in result.get("runs", []):
        run["predicted_tpot_ms"] = run["median_tpot_ms"] + n_sums * allreduce_us / 1e3
        rows.append(
            {
                "batch": run["batch_size"],
                "computing ms": f"{run['median_tpot_ms']:.2f}",
                "sums": n_sums,
                "us each": allreduce_us,
                "PREDICTED ms a step": f"{run['predicted_tpot_ms']:.2f}",
            }
        )
    return [messages, rows] if rows else [messages]


def device_name(ranks: Ranks) -> str:
    """The GPU's name, or the CPU's as Linux tells it."""
    if ranks.device.type == "cuda":
        return torch.cuda.get_device_name(ranks.device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
