"""`python -m llama_tp.generate` on the demo model as a person meets it: what goes in, and what
comes out where."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llama_tp.arch.errors import UserError
from llama_tp.generate import biases_of, prompts_of
from llama_tp.text.tokenizer import open_tokenizer
from tests.ranks import command, torchrun

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["--ckpt_dir", "checkpoints/demo", "--max_seq_len", "256"]
GREEDY = [*DEMO, "--temperature", "0", "--max_gen_len", "12"]
# of a --json line, in this order
KEYS = ["prompt", "generation", "tokens", "finish_reason", "logprobs"]


def generate(*words: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess:
    """The finished command; fails the test unless it ended with `code`."""
    return command("generate", *words, stdin=stdin, code=code)


def lines(*words: str, **options) -> list[dict]:
    """What the command prints with --json."""
    return [json.loads(line) for line in generate(*words, "--json", **options).stdout.splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(None, str(ROOT / "checkpoints/demo"))


@pytest.fixture(scope="module")
def romeo() -> dict:
    """The --json line of a greedy continuation, which other forms of the output are compared
    with."""
    [line] = lines(*GREEDY, "--prompt", "ROMEO:")
    assert list(line) == KEYS and line["prompt"] == "ROMEO:" and line["finish_reason"] == "length"
    assert len(line["tokens"]) == 12 and len(set(line["tokens"])) > 4 and line["logprobs"] is None
    return line


def test_text_alone_goes_to_stdout_and_the_rest_to_stderr(romeo):
    done = generate(*GREEDY, "--prompt", "ROMEO:")
    assert done.stdout == romeo["generation"] + "\n"
    for part in ["tok/s", "peak memory", "KV cache", " 3.73 M parameters"]:
        assert part in done.stderr


def test_quiet_leaves_stderr_empty(romeo):
    done = generate(*GREEDY, "--prompt", "ROMEO:", "--quiet")
    assert (done.stdout, done.stderr) == (romeo["generation"] + "\n", "")


def test_echo_prints_the_prompt_in_front(romeo, tokenizer):
    assert (
        generate(*GREEDY, "--prompt", "ROMEO:", "--echo", "--quiet").stdout
        == f"ROMEO:{romeo['generation']}\n"
    )
    [line] = lines(*GREEDY, "--prompt", "ROMEO:", "--echo", "--logprobs", "2")
    assert line["generation"] == "ROMEO:" + romeo["generation"]
    assert line["tokens"] == tokenizer.encode("ROMEO:", bos=True) + romeo["tokens"]
    assert len(line["logprobs"]) == len(line["tokens"])
    first, *rest = line["logprobs"]  # nothing stands before the first token to predict it
    assert first is None and [one["token"] for one in rest] == line["tokens"][1:]


def test_logprobs_are_of_each_token_and_the_likeliest(romeo):
    [line] = lines(*GREEDY, "--prompt", "ROMEO:", "--logprobs", "3")
    assert line["tokens"] == romeo["tokens"] and len(line["logprobs"]) == 12
    for token, one in zip(line["tokens"], line["logprobs"]):
        # greedy: the likeliest
        assert one["token"] == token == one["top"][0]["token"] and len(one["top"]) == 3
        assert one["logprob"] == one["top"][0]["logprob"] <= 0
        assert [each["logprob"] for each in one["top"]] == sorted(
            (each["logprob"] for each in one["top"]), reverse=True
        )


def test_a_dash_reads_the_prompt_from_stdin(romeo):
    assert lines(*GREEDY, "--prompt", "-", stdin="ROMEO:") == [romeo]


def test_a_file_holds_a_prompt_a_line_and_answers_keep_its_order(tmp_path, romeo):
    file = tmp_path / "prompts.txt"
    file.write_text('KING RICHARD:\n\n"two\\nlines: \\u00e9"\nROMEO:\n', encoding="utf-8")
    answers = lines(*GREEDY, "--prompts_file", str(file))
    assert [each["prompt"] for each in answers] == ["KING RICHARD:", "two\nlines: é", "ROMEO:"]
    assert answers[2] == romeo


def test_samples_of_a_prompt_differ_and_a_seed_repeats_them():
    words = [
        *DEMO,
        "--prompt",
        "ROMEO:",
        "--max_gen_len",
        "12",
        "--temperature",
        "1",
        "--n_samples",
        "3",
    ]
    one, again, other = (lines(*words, "--seed", seed) for seed in ("7", "7", "8"))
    assert one == again != other
    assert len({each["generation"] for each in one}) == 3


def test_stop_text_ends_before_it_and_is_not_printed(romeo):
    stop = romeo["generation"][5:8]
    [line] = lines(*GREEDY, "--prompt", "ROMEO:", "--stop", stop, "--stop", "never to be seen")
    assert (
        line["generation"] == romeo["generation"].split(stop)[0] and line["finish_reason"] == "stop"
    )


def test_stop_ids_and_bias_and_min_tokens(romeo):
    first, fourth = romeo["tokens"][0], romeo["tokens"][3]
    [line] = lines(*GREEDY, "--prompt", "ROMEO:", "--stop_ids", str(fourth))
    assert (
        line["tokens"] == romeo["tokens"][: romeo["tokens"].index(fourth)]
        and line["finish_reason"] == "stop"
    )
    [line] = lines(*GREEDY, "--prompt", "ROMEO:", "--stop_ids", str(fourth), "--min_tokens", "12")
    assert len(line["tokens"]) == 12 and fourth not in line["tokens"]
    [line] = lines(*GREEDY, "--prompt", "ROMEO:", "--logit_bias", f"{first}:-100")
    assert first not in line["tokens"]


def test_chat_wraps_the_prompt_and_keeps_its_text_plain(tokenizer):
    prompt = "<|eot_id|> is text here"
    [line] = lines(*GREEDY, "--chat", "--system", "Be brief.", "--prompt", prompt, "--echo")
    start, end, eot = (
        tokenizer.specials[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id")
    )
    ids = [tokenizer.specials["<|begin_of_text|>"]]
    for role, content in [("system", "Be brief."), ("user", prompt)]:
        ids += [
            start,
            *tokenizer.encode(role),
            end,
            *tokenizer.encode("\n\n"),
            *tokenizer.encode(content),
            eot,
        ]
    ids += [start, *tokenizer.encode("assistant"), end, *tokenizer.encode("\n\n")]
    assert line["tokens"][: len(ids)] == ids and line["tokens"][len(ids) - 1] != eot
    assert eot not in tokenizer.encode(prompt)


@pytest.mark.parametrize("temperature", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_two_ranks_print_what_one_does(temperature):
    words = [
        *DEMO,
        "--prompt",
        "ROMEO:",
        "--max_gen_len",
        "40",
        "--deterministic",
        "--temperature",
        temperature,
        "--seed",
        "3",
        "--quiet",
        "--device",
        "cpu",
    ]
    with torchrun(2, ["-m", "llama_tp.generate", *words]) as job:
        assert job.wait() == 0, job.stderr
        assert len(job.stdout) > 40 and job.stdout == generate(*words).stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["--prompt", "x", "--logprobs", "2"], "add --json"),
        (["--prompt", "x", "--system", "Be brief."], "add --chat"),
        (["--prompt", "x", "--prompts_file", "F"], "both --prompt and --prompts_file"),
        ([], "neither --prompt nor --prompts_file"),
        (["--prompt", "x", "--ckpt_dir", "no/such/folder"], "no/such/folder"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--top_p", "1.5"], "error: --top_p must be"),
        (
            ["--prompt", "x", "--max_gen_len", "-1"],
            "error: --max_gen_len must be a whole number from 1",
        ),
        (["--prompt", "x", "--n_samples", "0"], "error: --n_samples must be"),
        (
            ["--prompt", "x", "--max_gen_len", "2", "--min_tokens", "3"],
            "--min_tokens must not exceed --max_gen_len",
        ),
        (["--prompt", "x", "--max_batch_size", "-1"], "error: --max_batch_size is out of range"),
        (["--prompt", "x", "--max_seq_len", "-1"], "error: --max_seq_len is out of range"),
        (["--prompt", "x", "--max_step_tokens", "0"], "error: --max_step_tokens is out of range"),
        (["--prompt", "x", "--step_timeout", "0"], "error: --step_timeout is out of range"),
        (["--prompt", ""], "error: the prompt is empty"),
        (["--prompt", "x", "--logit_bias", "5000:1"], "5000"),
        (["--prompt", "long " * 300], "256"),
    ],
)
def test_bad_words_end_in_one_line_and_no_text(words, said):
    demo = [] if "--ckpt_dir" in words else DEMO[:2] if "--max_seq_len" in words else DEMO
    done = generate(*demo, *words, "--quiet", code=1)
    assert done.stdout == "" and done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(scope="module")
def not_finite(tmp_path_factory):
    """The demo with NaN in the last norm, which every logit goes through."""
    folder = tmp_path_factory.mktemp("nan") / "demo"
    shutil.copytree(ROOT / "checkpoints/demo", folder)
    for shard in folder.glob("*.pth"):
        tensors = torch.load(shard, weights_only=True)
        tensors["norm.weight"].fill_(float("nan"))
        torch.save(tensors, shard)
    return [
        "--ckpt_dir",
        str(folder),
        "--max_seq_len",
        "64",
        "--prompt",
        "ROMEO:",
        "--n_samples",
        "2",
    ]


def test_logits_that_are_not_finite_end_in_one_error_and_code_1(not_finite):
    done = generate(*not_finite, "--quiet", code=1)
    assert done.stdout == "\n\n" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(
        "error: 2 of 2 samples could not be completed - the model's logits are not finite"
    )
    done = generate(*not_finite, "--json", "--quiet", code=1)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["finish_reason"], line["tokens"]) for line in found] == [
        ("abort", [])
    ] * 2 and len(done.stderr.splitlines()) == 1
    assert all("not finite" in line["error"] for line in found)


def test_two_ranks_end_in_the_same_error(not_finite):
    with torchrun(2, ["-m", "llama_tp.generate", *not_finite, "--json", "--quiet"]) as job:
        assert job.wait(100) == 1
        assert (
            [line for line in job.stderr.splitlines() if line.startswith("error: ")]
            == [
                line for line in job.stderr.splitlines() if "samples could not be completed" in line
            ]
            != []
        )
        assert len(job.stdout.splitlines()) == 2 and not job.left_over(within=10)


def test_prompts_come_from_one_place(tmp_path):
    file = tmp_path / "prompts.txt"
    assert prompts_of("text", None) == ["text"]
    for content, said in [
        (b"", "no prompt"),
        (b"\n\n", "no prompt"),
        (b'fine\n"half', "line 2"),
        (b"\xff\xfe", "cannot be read"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            prompts_of(None, str(file))
    with pytest.raises(UserError, match="cannot be read"):
        prompts_of(None, str(tmp_path / "absent"))
    file.write_bytes('\ufeffa\u2028b\r\n\n"c\\n"\n'.encode())
    assert prompts_of(None, str(file)) == ["a\u2028b", "c\n"]


def test_no_text_is_a_mistake_unless_a_file_says_so(tmp_path, monkeypatch):
    """An empty --prompt is a shell variable that was not set, an empty stdin a command that failed;
    "" in a file is meant."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for prompt in ("", "-"):
        with pytest.raises(UserError, match="the prompt is empty"):
            prompts_of(prompt, None)
    (tmp_path / "prompts").write_text('""\n')
    assert prompts_of(None, str(tmp_path / "prompts")) == [""]


def test_a_stdin_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(UserError, match="--prompt - cannot be read"):
        prompts_of("-", None)


def test_a_bias_is_an_id_and_a_number():
    assert biases_of(("5:-100", "7:0.5")) == {5: -100.0, 7: 0.5}
    for wrong in ["5", "5:x", "x:1", "5:1:2"]:
        with pytest.raises(UserError, match="ID:BIAS"):
            biases_of((wrong,))
