"""`python -m llama_tp.batch` as a person meets it: a file in, a file out, whatever happens in
between."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import PATIENCE_S, command, torchrun

ROOT = Path(__file__).resolve().parents[1]
DEMO = ["--ckpt_dir", str(ROOT / "checkpoints/demo"), "--device", "cpu"]


def write_input(path: Path, n: int, first: int = 0) -> Path:
    """n lines of every kind that there is."""
    speakers = ["ROMEO", "JULIET", "KING RICHARD III", "First Citizen", "MENENIUS"]
    with open(path, "w", encoding="utf-8") as f:
        for i in range(first, first + n):
            user = [{"role": "user", "content": f"Speak as {speakers[i % 5]}, number {i}: \u00e9"}]
            line = [
                {"prompt": f"{speakers[i % 5]}:\nLine {i}", "max_tokens": 10 + i % 30},
                {"messages": user, "max_tokens": 8 + i % 20, "custom_id": f"chat \u00e9 {i}"},
                {
                    "custom_id": f"c{i}",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {
                        "model": "any",
                        "messages": user,
                        "n": 2,
                        "max_tokens": 12,
                        "logprobs": True,
                        "top_logprobs": 2,
                    },
                },
                {
                    "custom_id": f"t{i}",
                    "method": "POST",
                    "url": "/v1/completions",
                    "body": {
                        "model": "any",
                        "prompt": ["A", f"number {i}"],
                        "echo": True,
                        "logprobs": 1,
                        "max_tokens": 9,
                        "temperature": 0,
                    },
                },
                {
                    "prompt": f"{i}. O",
                    "max_tokens": 40,
                    "seed": 7,
                    "top_p": 1,
                    "temperature": 1.1,
                    "stop": ["\n\n"],
                },
            ][i % 5]
            f.write(json.dumps(line) + "\n" + ("\n" if i % 7 == 3 else ""))
    return path


def words(source: Path | str, target: Path | str, *more: str, rows: int = 4) -> list[str]:
    """The command's words; few rows, so that a job takes some time."""
    return [
        "-m",
        "llama_tp.batch",
        *DEMO,
        "--max_batch_size",
        str(rows),
        "--input",
        str(source),
        "--output",
        str(target),
        *more,
    ]


def batch(
    source: Path | str, target: Path | str, *more: str, rows: int = 4, code: int = 0
) -> subprocess.CompletedProcess:
    """The finished command on one rank; fails the test unless it ended with `code`."""
    _, module, *rest = words(source, target, *more, rows=rows)
    return command(module.removeprefix("llama_tp."), *rest, code=code)


def answers(target: Path) -> list[dict]:
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def n_lines(target: Path) -> int:
    return target.read_bytes().count(b"\n") if target.exists() else 0


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> tuple[Path, bytes]:
    """An input of 40 lines, and the bytes that an undisturbed run on one rank makes of it."""
    folder = tmp_path_factory.mktemp("batch")
    source, target = write_input(folder / "in.jsonl", 40), folder / "out.jsonl"
    done = batch(source, target)
    assert (
        done.stdout == ""
        and "all 40 lines are in" in done.stderr
        and "tok/s" in done.stderr
        and "lines/s" in done.stderr
    )
    return source, target.read_bytes()


def finished(forty: tuple[Path, bytes], folder: Path) -> Path:
    """The output of the undisturbed run, in a folder of its own, as if it had been written
    there."""
    source, data = forty
    target = folder / "out.jsonl"
    target.write_bytes(data)
    shutil.copy(source.with_name("out.jsonl.job"), folder)
    return target


def test_answers_have_openais_shape_and_the_inputs_order(forty):
    source, data = forty
    given = [json.loads(line) for line in source.read_text().splitlines() if line]
    found = [json.loads(line) for line in data.splitlines()]
    numbers = [i for i, line in enumerate(source.read_text().splitlines(), start=1) if line]
    assert [each["custom_id"] for each in found] == [
        line.get("custom_id", f"line-{i}") for line, i in zip(given, numbers)
    ]
    assert all(
        list(each) == ["id", "custom_id", "response", "error"] and each["error"] is None
        for each in found
    )
    assert all(each["response"]["status_code"] == 200 for each in found)
    assert (
        len({each["id"] for each in found})
        == len({each["response"]["body"]["id"] for each in found})
        == 40
    )
    assert [len(each["response"]["body"]["choices"]) for each in found[:5]] == [1, 1, 2, 2, 1]
    texts = [
        choice.get("text") or choice["message"]["content"]
        for each in found
        for choice in each["response"]["body"]["choices"]
    ]
    assert len(set(texts)) > 40
    two = found[2]["response"]["body"]["choices"]
    assert two[0]["message"] != two[1]["message"] and len(two[0]["logprobs"]["content"]) == 12
    echoed = found[3]["response"]["body"]
    assert (
        echoed["choices"][1]["text"].startswith("number 3")
        and echoed["usage"]["completion_tokens"] == 18
    )


def test_two_ranks_write_the_same_bytes(forty, tmp_path):
    source, data = forty
    with torchrun(2, words(source, tmp_path / "out.jsonl")) as job:
        assert job.wait() == 0, job.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == data


def test_another_batch_size_and_a_finished_file(forty, tmp_path):
    source, data = forty
    target = tmp_path / "out.jsonl"
    batch(source, target, rows=32)
    assert target.read_bytes() == data
    done = batch(source, target)  # again: nothing is loaded
    assert (
        "all 40 lines" in done.stderr and "ready" not in done.stderr and target.read_bytes() == data
    )


@pytest.mark.slow
def test_the_other_ranks_of_a_finished_job_hear_that_there_is_nothing_to_do(forty, tmp_path):
    source, data = forty
    target = finished(forty, tmp_path)
    with torchrun(2, words(source, target)) as job:
        assert job.wait() == 0 and "ready" not in job.stderr
    assert target.read_bytes() == data


def kill(job, who: str) -> None:
    with contextlib.suppress(IndexError, ProcessLookupError):  # it may have ended by itself
        os.kill(job.process.pid if who == "torchrun" else job.pids()[int(who)], signal.SIGKILL)
    job.wait()


@pytest.mark.parametrize(
    "kills",
    [
        [("0", 7)],
        pytest.param([("0", 6), ("1", 15), ("torchrun", 27)], marks=pytest.mark.slow),
    ],
    ids=["writer", "each"],
)
def test_killed_anywhere_it_ends_with_the_same_bytes(kills, forty, tmp_path):
    """`kills`: who is killed, and after how many lines. Rank 0 is the one that writes."""
    source, data = forty
    target = tmp_path / "out.jsonl"
    for who, goal in kills:
        with torchrun(2, words(source, target)) as job:
            while n_lines(target) < goal:
                assert job.process.poll() is None, job.stderr
                time.sleep(0.005)
            kill(job, who)
            assert not job.left_over(within=job.soon(20))
        assert goal <= n_lines(target) < 40, "it was too late to kill"
        whole = target.read_bytes().rpartition(b"\n")[0]
        assert data.startswith(whole) and len(whole) > 100
    with torchrun(2, words(source, target)) as job:
        assert job.wait() == 0, job.stderr
    assert target.read_bytes() == data


def test_sigterm_ends_after_a_step_and_names_the_command_that_goes_on(forty, tmp_path):
    source, data = forty
    target = tmp_path / "out.jsonl"
    with torchrun(2, words(source, target)) as job:
        while n_lines(target) < 5:
            assert job.process.poll() is None, job.stderr
            time.sleep(0.005)
        job.process.terminate()
        assert job.wait() != 0 and not job.left_over(within=job.soon(5))
        [said] = [line for line in job.stderr.splitlines() if line.startswith("batch: stopped")]
    assert "stopped by SIGTERM" in said and f"after {n_lines(target)} of 40 lines" in said
    assert (
        f"python -m llama_tp.launch --nproc_per_node 2 batch --ckpt_dir {DEMO[1]} --input {source} "
        f"--output {target}" in said
    )
    assert data.startswith(target.read_bytes()) and 5 <= n_lines(target) < 40
    one = subprocess.Popen(
        [sys.executable, *words(source, target)], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8"
    )
    so_far = n_lines(target)
    while n_lines(target) < so_far + 3:
        assert one.poll() is None
        time.sleep(0.005)
    one.terminate()
    _, said = one.communicate(timeout=PATIENCE_S)
    assert (
        one.returncode == 128 + signal.SIGTERM and "to go on: python -m llama_tp.batch" in said
    ), said
    batch(source, target)
    assert target.read_bytes() == data


def test_a_torn_last_line_is_cut(forty, tmp_path):
    source, data = forty
    target = finished(forty, tmp_path)
    end = data.index(b"\n", len(data) // 2) + 1
    for torn in [data[: end + 50], data[: end - 1] + b"\0" * 4096]:
        target.write_bytes(torn)
        batch(source, target)
        assert target.read_bytes() == data


def test_another_job_is_refused_before_anything_is_loaded(forty, tmp_path):
    source, data = forty
    target = finished(forty, tmp_path)
    other = write_input(tmp_path / "other.jsonl", 41)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    for changed, said in [
        ([str(other)], "the input is another"),
        ([str(source), "--generation_config", str(tmp_path)], "the generation config is another"),
        (
            [str(source), "--seed", "2", "--max_seq_len", "200"],
            "max_seq_len was 512 and is 200; seed was 1 and is 2",
        ),
    ]:
        done = batch(changed[0], target, *changed[1:], "--quiet", code=1)
        assert (
            "belongs to another job" in done.stderr
            and said in done.stderr
            and done.stderr.count("\n") == 1
        )
    target.with_name("out.jsonl.job").unlink()
    assert "no job is known" in batch(source, target, "--quiet", code=1).stderr
    assert target.read_bytes() == data


BAD = [
    '{"prompt": "fine", "max_tokens": 3, "custom_id": "a"}',
    '{"prompt": "x", "temperatur": 0}',
    "not json",
    '{"prompt": "again", "max_tokens": 3, "custom_id": "a"}',
    json.dumps({"prompt": "long " * 600}),
    '{"custom_id": "b", "method": "POST", "url": "file:///etc/passwd", "body": {}}',
    "[]",
    '{"custom_id": "c"}',
    '{"custom_id": "d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", '
    '"stream": true}}',
    '{"prompt": "fine too", "max_tokens": 3}',
]


def test_bad_lines_are_listed_before_anything_is_loaded(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(BAD))
    # the rank that waits for rank 0's word says nothing
    with torchrun(2, words(source, target)) as job:
        assert job.wait() == 1 and not job.left_over(within=job.soon(5))
        assert [
            line.split(" - ")[0]
            for line in job.stderr.splitlines()
            if line.startswith(("error", "[rank"))
        ] == [f"error: --input {source} has bad lines"]
    done = batch(source, target, code=1)
    listed = [line for line in done.stderr.splitlines() if line.startswith("batch: bad line ")]
    assert [line.split(":")[1].split()[-1] for line in listed] == [
        "2",
        "3",
        "4",
        "5",
        "6",
        "7",
        "8",
        "9",
    ]
    for said, line in zip(
        [
            "temperature?",
            "not JSON",
            "same custom_id",
            "too long",
            "url must be",
            "JSON object",
            "prompt or messages",
            "stream is not supported",
        ],
        listed,
    ):
        assert said in line
    assert (
        "has bad lines - 8 of 10" in done.stderr
        and "--skip_bad" in done.stderr
        and "ready" not in done.stderr
    )
    assert list(tmp_path.iterdir()) == [source]

    done = batch(source, target, "--skip_bad", code=1)
    assert "8 of 10 lines failed" in done.stderr
    found = answers(target)
    ids = ["a", "line-2", "line-3", "line-4", "line-5", "b", "line-7", "c", "d", "line-10"]
    assert [each["custom_id"] for each in found] == ids
    assert [each["response"]["status_code"] for each in found] == [200] + [400] * 8 + [200]
    assert all(bool(each["error"]) == (i in range(1, 9)) for i, each in enumerate(found))
    assert (
        found[4]["error"]["code"]
        == "context_length_exceeded"
        == found[4]["response"]["body"]["error"]["code"]
    )
    first = target.read_bytes()
    target.write_bytes(first[: len(first) // 2])
    # without the flag it is refused again
    assert "bad lines" in batch(source, target, code=1).stderr
    batch(source, target, "--skip_bad", code=1)
    assert target.read_bytes() == first


def test_failed_lines_are_run_again_in_their_places(forty, tmp_path):
    """A failure that goes away: written here as the line that a NaN leaves behind."""
    source, data = forty
    target = finished(forty, tmp_path)
    lines = data.splitlines(keepends=True)
    for i in (3, 20):
        begins = lines[i].split(b"200, ")[0]
        lines[i] = (
            begins
            + b'500, "request_id": "x", "body": {}}, "error": {"code": "engine_error", "message": '
            b'"NaN"}}\n'
        )
    target.write_bytes(b"".join(lines))
    done = batch(source, target, code=1)
    # skipped, but not forgotten
    assert "2 of 40 lines failed" in done.stderr and "ready" not in done.stderr
    assert target.read_bytes() == b"".join(lines)
    retry = tmp_path / "out.jsonl.retry"
    with subprocess.Popen(
        [sys.executable, *words(source, target, "--retry_failed")],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    ) as one:
        while n_lines(retry) < 10 and one.poll() is None:
            time.sleep(0.002)
        one.kill()
    batch(source, target, "--retry_failed")
    assert target.read_bytes() == data and not retry.exists()


def test_flags_that_cannot_be(tmp_path):
    source = write_input(tmp_path / "in.jsonl", 1)
    for changed, said in [
        (["no/such.jsonl", "x"], "no such file"),
        ([str(source), "no/such/out.jsonl"], "no such folder"),
        ([str(source), str(tmp_path)], "cannot be written"),
        ([str(source), str(tmp_path / "x"), "--max_gen_len", "-1"], "--max_gen_len must be"),
    ]:
        assert said in batch(*changed, "--quiet", code=1).stderr
    for flag, value, wrong in [
        ("--temperature", "-3", "must be"),
        ("--max_step_tokens", "0", "is out of range - found 0"),
    ]:
        said = batch(source, tmp_path / "x", "--quiet", flag, value, code=1).stderr
        assert said.startswith(f"error: {flag} {wrong}") and not (tmp_path / "x.job").exists()
    (tmp_path / "empty.jsonl").write_text("\n \n")
    assert (
        "holds no lines" in batch(tmp_path / "empty.jsonl", tmp_path / "out.jsonl", code=1).stderr
    )


def test_scores_are_those_of_the_tokens_written(tmp_path):
    """What lm-eval does: write, then score the same ids as a prompt, with one token more; then with
    none. To the bit."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def completion(custom_id: str, **body) -> dict:
        body = {"model": "m", "temperature": 0, "logprobs": 2} | body
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}

    source.write_text(
        json.dumps(completion("write", prompt="ROMEO:", max_tokens=12, return_token_ids=True))
    )
    batch(source, target)
    [written] = answers(target)[0]["response"]["body"]["choices"]
    ids = written["prompt_token_ids"] + written["token_ids"]
    lines = [
        completion(f"score{n}", prompt=[ids, ids[:-3]], echo=True, max_tokens=n) for n in (0, 1)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch(source, tmp_path / "scores.jsonl")
    for n, line in enumerate(answers(tmp_path / "scores.jsonl")):
        for choice, length in zip(line["response"]["body"]["choices"], (len(ids), len(ids) - 3)):
            arrays, first = choice["logprobs"], len(written["prompt_token_ids"])
            assert {len(each) for each in arrays.values()} == {length + n}
            for name in ("tokens", "token_logprobs", "top_logprobs"):
                assert arrays[name][first:length] == written["logprobs"][name][: length - first]
            assert all(
                number == max(top.values())
                for number, top in list(zip(arrays["token_logprobs"], arrays["top_logprobs"]))[
                    first:length
                ]
            )


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A tmpfs of its own; skips the test where one may not be mounted."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_the_job_goes_on_when_there_is_room(forty, tmp_path):
    source, data = forty
    with small_disk(tmp_path / "disk", "64k") as disk:
        filler, target = disk / "filler", disk / "out.jsonl"
        # room for the sidecar and two pages of answers
        filler.write_bytes(b"x" * (64 * 1024 - 4096 * 4))
        with torchrun(2, words(source, target)) as job:
            assert job.wait() == 1, job.stderr
            [said] = [line for line in job.stderr.splitlines() if line.startswith("error:")]
        assert (
            "No space left on device" in said
            and "whole lines" in said
            and "run the same command again" in said
        )
        assert 0 < n_lines(target) < 40 and data.startswith(target.read_bytes())
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        batch(source, target)
        assert target.read_bytes() == data


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_of_five_hundred_lines(tmp_path):
    source, whole, target = (
        write_input(tmp_path / "in.jsonl", 500),
        tmp_path / "whole.jsonl",
        tmp_path / "out.jsonl",
    )
    started = time.monotonic()
    with torchrun(2, words(source, whole)) as job:
        assert job.wait(600) == 0, job.stderr
    took_s = time.monotonic() - started
    dice, n_kills, done_at = random.Random(11), 0, []
    for turn in range(200):
        who = ("0", "1", "torchrun")[turn % 3]
        with torchrun(2, words(source, target)) as job:
            # so that twenty kills fit into one job; some fall into its start
            goal = n_lines(target) + dice.randint(1, 24)
            late = time.monotonic() + (dice.uniform(1, took_s) if turn % 5 == 4 else 600)
            while n_lines(target) < goal and time.monotonic() < late and job.process.poll() is None:
                time.sleep(0.002)
            if job.process.poll() is not None:
                break
            kill(job, who)
            n_kills += 1
            done_at.append(n_lines(target))
        if n_kills == 20:
            break
    assert n_kills == 20 and done_at[-1] < 500, done_at
    with torchrun(2, words(source, target)) as job:
        assert job.wait(600) == 0, job.stderr
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "name, found",
    [
        ("in.jsonl", "it is the --input"),
        ("link.jsonl", "it is the --input"),
        ("empty.jsonl", "it is the --input"),
        ("side", "it is the --input, or a file beside"),
        ("/dev/full", "it is no file"),
        (".", "it is no file"),
    ],
)
def test_an_output_that_is_no_file_of_its_own_is_refused_and_left_alone(name, found, tmp_path):
    source = write_input(tmp_path / "in.jsonl", 1)
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "side.retry").symlink_to(source)
    before = source.read_bytes()
    done = batch(
        tmp_path / "empty.jsonl" if name == "empty.jsonl" else source, tmp_path / name, code=1
    )
    assert done.stderr.startswith(f"error: --output {tmp_path / name} cannot be written - {found}")
    assert source.read_bytes() == before and (tmp_path / "empty.jsonl").exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "empty.jsonl",
        "in.jsonl",
        "link.jsonl",
        "side.retry",
    ]
