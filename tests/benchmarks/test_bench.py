"""The bench command: what it prints, what it refuses, and that its numbers hang together."""

import json
import subprocess

import pytest
import torch

from llama_tp.arch.errors import UserError
from llama_tp.arch.weights import table
from llama_tp.benchmarks.ceiling import Ceiling
from llama_tp.benchmarks.latency import latency
from llama_tp.benchmarks.table import markdown
from llama_tp.benchmarks.throughput import throughput
from llama_tp.parallel.groups import single_rank
from tests import reference
from tests.engines import engine
from tests.ranks import command, torchrun
from tests.shapes import SHRUNK

DEMO = [
    "--ckpt_dir",
    "checkpoints/demo",
    "--device",
    "cpu",
    "--n_runs",
    "1",
    "--input_len",
    "16",
    "--output_len",
    "8",
]


def bench(*words: str, code: int = 0) -> subprocess.CompletedProcess:
    return command("bench", *words, code=code)


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_latency_prints_card_table_and_json(tmp_path):
    done = bench(
        "latency",
        *DEMO,
        "--batch_size",
        "1",
        "--batch_size",
        "3",
        "--save",
        str(tmp_path / "one.json"),
    )
    result = last_line(done.stdout)
    assert "ceiling of each of 1 rank(s)" in done.stdout and "| batch |" in done.stdout
    assert result == json.loads((tmp_path / "one.json").read_text())
    assert (
        [run["batch_size"] for run in result["runs"]] == [1, 3]
        and result["tp"] == 1
        and not result["simulated"]
    )
    limits = Ceiling(**result["ceiling"])
    for run in result["runs"]:
        n, n_in, n_out = run["batch_size"], run["input_len"], run["output_len"]
        assert len(run["latencies"]) == 1 and 0 < run["median_tpot_ms"] < 1e3 * run["avg_latency"]
        assert run["floor_tpot_ms"] == pytest.approx(1e3 * limits.decode_s(n, n_in + n_out // 2))
        assert run["floor_ttft_ms"] == pytest.approx(1e3 * limits.prefill_s(n * n_in))


def test_throughput_counts_all_tokens():
    result = last_line(bench("throughput", *DEMO, "--n_requests", "5").stdout)
    assert result["num_requests"] == 5 and 5 * (16 + 8) / 2 <= result[
        "total_num_tokens"
    ] <= 5 * 1.5 * (16 + 8)
    assert result["tokens_per_second"] == pytest.approx(
        result["total_num_tokens"] / result["elapsed_time"]
    )


def test_startup_compares_with_reading():
    result = last_line(bench("startup", *DEMO).stdout)
    assert result["load_s"] > 0 and result["read_s"] > 0
    assert (
        result["process_to_first_token_s"]
        >= result["import_s"] + result["load_s"] + result["first_token_s"]
    )


def test_a_model_whose_logits_are_not_finite_is_not_measured():
    config, limits = SHRUNK["8b"], Ceiling(1e9, 1e9, 1, 1, 2, 1, 1)
    weights = reference.random_weights(table(config))
    weights["norm.weight"] = torch.full_like(weights["norm.weight"], float("nan"))
    for measure in (
        lambda one: latency(one, limits, [2], 8, 4, 1),
        lambda one: throughput(one, limits, 2, 8, 4, 0.0, 2),
    ):
        with pytest.raises(UserError, match="cannot be measured - .*not finite"):
            measure(engine(single_rank(), config, weights=dict(weights)))


def test_two_ranks_measure_together():
    with torchrun(2, ["-m", "llama_tp.bench", "latency", *DEMO, "--batch_size", "2"]) as job:
        assert job.wait() == 0, job.stderr
        assert last_line(job.stdout)["tp"] == 2


def test_a_simulated_rank_is_called_a_prediction():
    words = [
        "--model",
        "8B",
        "--n_layers",
        "1",
        "--tp",
        "8",
        "--simulate_rank",
        "0",
        "--allreduce_us",
        "50",
        "--device",
        "cpu",
    ]
    done = bench(
        "latency",
        *words,
        "--n_runs",
        "1",
        "--input_len",
        "8",
        "--output_len",
        "4",
        "--batch_size",
        "1",
    )
    result = last_line(done.stdout)
    assert (
        result["simulated"]
        and "ONE rank of tp 8, simulated" in done.stdout
        and "PREDICTED" in done.stdout
    )
    [run] = result["runs"]
    # 2 sums a layer, 1 embedding
    assert run["predicted_tpot_ms"] == pytest.approx(run["median_tpot_ms"] + 3 * 0.05)
    assert str(8 * 4096 * 2) in done.stdout  # bytes of a sum of 8 rows in bf16


@pytest.mark.parametrize(
    "words, said",
    [
        (["latency"], "neither --ckpt_dir nor --model"),
        (["latency", "--model", "2B"], "1B, 3B, 8B, 70B, 405B"),
        (["latency", "--model", "1B", "--tp", "8"], "--simulate_rank"),
        (["startup", "--model", "1B"], "give --ckpt_dir"),
        (["throughput", "--model", "1B", "--plot", "x.png"], "--plot draws latency"),
        (["latency", "--model", "8B", "--tp", "3", "--simulate_rank", "0"], "3 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, said):
    done = bench(*words, code=1)
    assert done.stdout == "" and said in done.stderr and done.stderr.count("\n") == 1


def test_a_picture_of_several_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra llama_tp[bench] is not installed")
    bench(
        "latency",
        *DEMO,
        "--batch_size",
        "1",
        "--batch_size",
        "2",
        "--save",
        str(tmp_path / "a.json"),
    )
    bench(
        "latency",
        *DEMO,
        "--batch_size",
        "1",
        "--batch_size",
        "2",
        "--beside",
        str(tmp_path / "a.json"),
        "--plot",
        str(tmp_path / "b.png"),
    )
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_floors_follow_the_slower_of_reading_and_multiplying():
    ceiling = Ceiling(
        read_bytes_per_s=1e9,
        flops_per_s=1e12,
        weight_bytes_per_step=10**9,
        kv_bytes_per_position=10**6,
        flops_per_token=10**9,
        head_flops=5 * 10**8,
        tp=1,
    )
    assert ceiling.decode_s(1, 0) == 1.0 and ceiling.decode_s(1, 100) == pytest.approx(1.1)
    assert ceiling.decode_s(2000, 0) == pytest.approx(2.0)
    assert ceiling.prefill_s(10) == 1.0 and ceiling.prefill_s(3000) == pytest.approx(1.5)


def test_a_table_is_aligned_markdown():
    assert markdown([{"a": 1, "long": "x"}, {"a": 22, "long": "yy"}]) == (
        "|  a | long |\n|---:|-----:|\n|  1 |    x |\n| 22 |   yy |"
    )
