"""Pictures of latency results: tokens per second and time per token against the batch, beside the
floor; tp beside tp."""

from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.arch.memory import counted


def draw(results: list[dict[str, Any]], path: str) -> None:
    """Draws latency results (bench's JSON lines) into a PNG or SVG. Raises UserError without
    matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError(
            "--plot needs matplotlib", "it is not installed", "pip install 'llama_tp[bench]'"
        ) from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, result in enumerate(results):
        batches = [run["batch_size"] for run in result["runs"]]
        label, colour = f"tp {result['tp']}", f"C{i}"
        left.plot(
            batches,
            [run["output_throughput"] for run in result["runs"]],
            "o-",
            color=colour,
            label=label,
        )
        left.plot(
            batches,
            [1e3 * b / run["floor_tpot_ms"] for b, run in zip(batches, result["runs"])],
            "--",
            color=colour,
            alpha=0.5,
            label=f"{label}, ceiling",
        )
        right.plot(
            batches,
            [run["median_tpot_ms"] for run in result["runs"]],
            "o-",
            color=colour,
            label=label,
        )
        right.plot(
            batches, [run["floor_tpot_ms"] for run in result["runs"]], "--", color=colour, alpha=0.5
        )
    for axes, title, unit in (
        (left, "decode throughput", "tokens / s"),
        (right, "time per token", "ms"),
    ):
        axes.set(title=title, xlabel="sequences at once", ylabel=unit, xscale="log", ylim=(0, None))
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend()
    one = results[0]
    figure.suptitle(
        f"{one['model']}, {counted(one['n_params'])} parameters, {one['dtype']}, {one['device']}; "
        "dashed: what the memory and the multipliers allow",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
