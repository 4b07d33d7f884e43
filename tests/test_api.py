"""The Python API under torchrun: Meta's script, the modern calls on every rank, and calls that only
one rank makes."""

import json
from pathlib import Path

import pytest

from tests.ranks import torchrun

SCRIPTS = Path(__file__).parent / "scripts"
DEMO = str(Path(__file__).parent.parent / "checkpoints" / "demo")


@pytest.mark.parametrize("tp", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_metas_script_prints_once(tp):
    """Its greedy lines at tp 2 need not be those of tp 1: the demo runs in bf16, and the script
    knows no --deterministic."""
    with torchrun(tp, [str(SCRIPTS / "meta_example.py"), DEMO, f"{DEMO}/tokenizer.model"]) as job:
        assert job.wait() == 0, job.stderr
        lines = job.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("> assistant: ") and len(line) > 20 for line in lines[:2])
    prompts = [line.split(":")[0] for line in lines[2:]]
    assert [each.strip("> '\"") for each in prompts] == ["ROMEO", "JULIET"]
    for line in lines[2:]:  # with echo: prompt and 8 new tokens, a logprob for each
        n_tokens, n_logprobs = map(int, line.split()[-2:])
        assert n_tokens == n_logprobs and n_tokens in (3 + 8, 5 + 8)


def test_modern_calls_on_every_rank(tmp_path):
    with torchrun(2, [str(SCRIPTS / "modern_api.py"), DEMO, str(tmp_path / "got")]) as job:
        assert job.wait() == 0, job.stderr
        assert job.stdout == "said once\n"
    got, same = (json.loads((tmp_path / f"got.{rank}").read_text()) for rank in (0, 1))
    assert got == same
    assert got["one"] == got["ids"] == got["after"]
    assert got["one"]["finish_reason"] == "length" and len(got["one"]["tokens"]) == 6
    assert got["stream"][-1] == got["one"]["text"] and len(got["stream"]) == 6
    assert [len(each["tokens"]) for each in got["several"]] == [3, 3, 4] and [
        each["index"] for each in got["several"]
    ] == [0, 1, 0]
    assert [len(each["top"]) for each in got["several"][0]["logprobs"]] == [2, 2, 2]
    assert len(got["chat"]) == 2
    assert [error.split(" - ")[0] for error in got["errors"]] == [
        "the prompt is too long",
        "params must be one SamplingParams, or one a prompt",
        "a message has an unknown role",
    ]


@pytest.mark.parametrize("rank", ["1", pytest.param("0", marks=pytest.mark.slow)])
def test_a_call_made_on_one_rank_only_ends_in_one_error(rank):
    with torchrun(2, [str(SCRIPTS / "one_sided.py"), DEMO, rank]) as job:
        assert job.wait() != 0
        assert not job.left_over(within=job.soon(5))
        errors = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1 and "call" in errors[0] and "every rank must make every call" in errors[0]
    ), job
