"""A whole batch job on an engine without a model: files that were cut, foreign files, order,
windows, memory."""

import fcntl
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.batch_job import journal, work
from llama_tp.batch_job.check import MAX_SHOWN, check_lines
from llama_tp.batch_job.job import open_job, sampled_digest, tokenizer_digest
from llama_tp.batch_job.journal import Journal
from llama_tp.batch_job.work import Work
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.order import ServedModel
from llama_tp.text.token_table import Tokenizer
from tests.protocol.served import MODEL, FakeEngine

ROOT = Path(__file__).resolve().parents[2]
MADE_OF = {"model": "m", "parameters": {"seed": 1, "top_p": None}}
POISON = MODEL.tokenizer.encode("q")[0]  # a fake engine gives requests up that hold it


SEVEN = MODEL.tokenizer.encode("number 7")[-1]  # in some prompts of write_input


def write_input(path: Path, n: int) -> Path:
    path.write_text(
        "".join(
            json.dumps({"prompt": f"number {i}", "n": 1 + i % 3, "max_tokens": 9}) + "\n"
            for i in range(n)
        )
    )
    return path


def opened(
    folder: Path,
    made_of: dict = MADE_OF,
    skip_bad: bool = False,
    retry_failed: bool = False,
    told: list | None = None,
):
    return open_job(
        str(folder / "in"),
        str(folder / "out"),
        MODEL,
        SamplingDefaults(),
        made_of,
        skip_bad,
        retry_failed,
        ([] if told is None else told).append,
    )


def worked(job, engine=None, steps: int = 10**9) -> FakeEngine:
    """The engine after up to so many steps on a job, whose files are then closed as if the process
    had ended."""
    engine, left = engine or FakeEngine(), iter(range(steps))
    Work(job, engine, engine.n_rows, "fp", lambda *numbers: None).run(
        lambda: next(left, None) is None
    )
    for each in filter(None, (job.target, job.old)):
        each.close()
    return engine


@pytest.fixture
def whole(tmp_path) -> bytes:
    """The output of an undisturbed run of tmp_path/in, which is then removed."""
    write_input(tmp_path / "in", 30)
    worked(opened(tmp_path))
    data = (tmp_path / "out").read_bytes()
    assert data.count(b"\n") == 30
    (tmp_path / "out").unlink()
    return data


def test_any_cut_is_gone_on_from(tmp_path, whole):
    dice = random.Random(3)
    for cut in [0, 1, len(whole) - 1, len(whole), *(dice.randrange(len(whole)) for _ in range(20))]:
        tail = dice.choice([b"", b"\0" * 100, b"\0" * 100 + b"\n"])
        (tmp_path / "out").write_bytes(whole[:cut] + tail)
        worked(opened(tmp_path), FakeEngine(n_rows=dice.randint(1, 9)))
        assert (tmp_path / "out").read_bytes() == whole, (cut, tail)


def test_any_stop_is_gone_on_from(tmp_path, whole):
    n_runs = 0
    while not (
        done := (tmp_path / "out").read_bytes() == whole if (tmp_path / "out").exists() else False
    ):
        worked(opened(tmp_path), steps=12)
        n_runs += 1
    assert done and n_runs > 3


def test_lines_go_to_the_engine_ahead_of_their_turn_and_not_too_far(tmp_path, monkeypatch):
    write_input(tmp_path / "in", 600)
    engine = worked(opened(tmp_path), FakeEngine(n_rows=4))
    assert engine.submitted == 600 and 4 * 4 <= engine.most_open < 4 * 4 + 3
    data = (tmp_path / "out").read_bytes()
    # 4 lines between the first that is missing and the last begun
    monkeypatch.setattr(work, "REORDER", 1)
    monkeypatch.setattr(work, "HELD_BYTES", 1)
    (tmp_path / "out").unlink()
    engine = worked(opened(tmp_path), FakeEngine(n_rows=4))
    assert engine.most_open <= 4 * 3 and (tmp_path / "out").read_bytes() == data


def test_a_long_line_holds_up_the_file_and_not_the_engine(tmp_path):
    write_input(tmp_path / "in", 100)
    lines = (tmp_path / "in").read_text().splitlines()
    (tmp_path / "in").write_text("\n".join([json.dumps({"prompt": ["first"] * 8, "n": 8}), *lines]))
    job, engine = opened(tmp_path), FakeEngine(n_rows=4)
    seen = []
    assert Work(
        job, engine, 4, "fp", lambda n_lines, *_: seen.append((n_lines, engine.submitted))
    ).run(lambda: False)
    assert seen[0] == (0, 8)  # its samples alone fill the queue
    assert max(submitted for n_lines, submitted in seen if n_lines == 0) > 8 + 4
    assert seen[-1] == (101, 108)


def test_a_request_that_the_engine_gives_up_fails_its_line_alone(tmp_path):
    prompts = [["a"], ["q"], ["b", "q", "c"], ["d"]]
    (tmp_path / "in").write_text(
        "".join(json.dumps({"prompt": each, "n": 2, "max_tokens": 9}) + "\n" for each in prompts)
    )
    job = opened(tmp_path)
    engine = worked(job, FakeEngine(poison=POISON))
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [each["response"]["status_code"] for each in found] == [
        200,
        500,
        500,
        200,
    ] and job.n_failed == 2
    assert found[1]["error"] == {
        "code": "engine_error",
        "message": "the engine ended this request - not finite",
    }
    assert not engine.has_work

    job = opened(tmp_path)  # done and failed lines are left alone
    assert job.is_done and job.n_failed == 2
    job.target.close()
    healed = worked(opened(tmp_path, retry_failed=True))
    assert healed.submitted == 4
    assert all(
        json.loads(line)["error"] is None for line in (tmp_path / "out").read_text().splitlines()
    )
    assert (
        not (tmp_path / "out.retry").exists() and not opened(tmp_path, retry_failed=True).n_failed
    )


def test_a_retry_that_was_stopped_is_gone_on_from(tmp_path):
    """Also when there was more to do than the failed lines, and when it was run without the flag in
    between."""
    prompts = [f"{i} {'q' if i % 5 == 1 else ''}" for i in range(40)]
    (tmp_path / "in").write_text(
        "".join(json.dumps({"prompt": each, "max_tokens": 9}) + "\n" for each in prompts)
    )
    worked(opened(tmp_path))
    healthy = (tmp_path / "out").read_bytes()
    (tmp_path / "out").unlink()
    worked(opened(tmp_path), FakeEngine(poison=POISON))
    failed = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(failed[: len(failed) * 3 // 4])
    worked(opened(tmp_path, retry_failed=True), steps=12)
    assert 0 < (tmp_path / "out.retry").read_bytes().count(b"\n") < 40
    worked(opened(tmp_path), FakeEngine(poison=POISON), steps=12)
    while (tmp_path / "out").read_bytes() != healthy:
        worked(opened(tmp_path, retry_failed=True), steps=12)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "out", "out.job"]


def test_files_of_other_jobs_are_not_touched(tmp_path, whole):
    (tmp_path / "out").write_bytes(whole)
    for made_of, said in [
        (MADE_OF | {"model": "n"}, "the model is another"),
        (MADE_OF | {"parameters": {"seed": 2, "top_p": None}}, "seed was 1 and is 2"),
        ({"model": "m"}, "the parameters is another"),
    ]:
        with pytest.raises(UserError, match=said):
            opened(tmp_path, made_of)
    (tmp_path / "in").write_text((tmp_path / "in").read_text().replace("number 29", "number 30"))
    with pytest.raises(UserError, match="the input is another"):
        opened(tmp_path)
    write_input(tmp_path / "in", 30)
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(UserError, match="line 1 does not answer"):
        opened(tmp_path)
    (tmp_path / "out").write_bytes(
        whole[: whole.index(b"choices", len(whole) // 2)] + b'{"id": 5}\n'
    )
    with pytest.raises(UserError, match="is no JSON"):
        opened(tmp_path)
    assert (tmp_path / "out").read_bytes().endswith(b'{"id": 5}\n')
    for ours, theirs in [
        (whole, b"mine\n"),
        (whole, b"mine"),
        (whole[:-5], b"\n"),
        (b"", b'{"id": 5}\n'),
        (b"", b"mine"),
    ]:
        (tmp_path / "out").write_bytes(ours + theirs)  # also at the end, no crash leaves this
        with pytest.raises(UserError, match="does not answer"):
            opened(tmp_path)
        assert (tmp_path / "out").read_bytes() == ours + theirs
    for content in (b"{", b"[]", b"{}"):
        (tmp_path / "out.job").write_bytes(content)
        with pytest.raises(UserError, match="out.job cannot be read"):
            opened(tmp_path)
    (tmp_path / "out.job").unlink()
    with pytest.raises(UserError, match="no job is known"):
        opened(tmp_path)
    (tmp_path / "out").write_bytes(b"")  # but an empty one is nobody's
    worked(opened(tmp_path))
    assert (tmp_path / "out").read_bytes() == whole


def test_lines_must_have_been_computed_in_the_same_way(tmp_path, whole):
    job = opened(tmp_path)
    job.computed_by({"device": "cpu"})
    worked(job, steps=9)
    job = opened(tmp_path)
    job.computed_by({"device": "cpu"})
    with pytest.raises(UserError, match="device was cpu and is cuda"):
        job.computed_by({"device": "cuda"})
    job.target.close()
    (tmp_path / "out").unlink()
    worked(opened(tmp_path), FakeEngine(poison=SEVEN))
    # the good lines are kept: the others must be computed alike
    job = opened(tmp_path, retry_failed=True)
    assert job.target.n_lines == 0 < job.n_lines
    with pytest.raises(UserError, match="device was cpu and is cuda"):
        job.computed_by({"device": "cuda"})


@pytest.mark.parametrize("steps", [0, 10])
def test_an_input_that_is_changed_meanwhile_is_seen(tmp_path, whole, steps):
    job, left = opened(tmp_path), iter(range(steps))
    work = Work(job, FakeEngine(), 1, "fp", lambda *numbers: None)
    assert not work.run(lambda: next(left, None) is None) and not work.input_ended
    write_input(tmp_path / "in", 31)
    with pytest.raises(UserError, match="was changed while the job ran"):
        work.run(lambda: False)


def test_two_processes_cannot_write_one_file(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(journal, "LOCK_WAIT_S", 0.5)
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="being written by another process"):
        Journal(tmp_path / "out")
    os.close(fd)
    Journal(tmp_path / "out").close()


def test_bad_lines_are_counted_and_the_first_are_listed(tmp_path):
    good, bad = '{"prompt": "x", "custom_id": "%s"}\n', "nonsense\n"
    (tmp_path / "in").write_text(
        good % "a" + bad * 30 + good % "a" + good % "b" + good % "line-3" + '{"custom_id": "b"}\n'
    )
    checked = check_lines(str(tmp_path / "in"), MODEL, SamplingDefaults(), b"k" * 32)
    assert (checked.n_lines, checked.n_bad) == (35, 30 + 2 + 1) and len(checked.shown) == MAX_SHOWN
    nested = (
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", '
        '"body": {"prompt": "x", "custom_id": 1}}\n'
    )
    (tmp_path / "b").write_text(nested + good % "a")  # bad, and still the first of its name
    assert check_lines(str(tmp_path / "b"), MODEL, SamplingDefaults(), b"k" * 32).duplicates == {2}
    (tmp_path / "b").unlink()
    assert [number for number, _ in checked.shown] == list(
        range(2, 2 + MAX_SHOWN)
    ) and checked.duplicates == {32, 34, 35}
    told: list[str] = []
    with pytest.raises(UserError, match="33 of 35, from line 2 on"):
        opened(tmp_path, told=told)
    assert (
        told[0].startswith("bad line 2: the line is not JSON")
        and told[-1] == f"and {33 - MAX_SHOWN} more bad lines"
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in"]
    worked(opened(tmp_path, skip_bad=True))
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [each["error"] is None for each in found] == [True] + [False] * 31 + [True] + [False] * 2


def test_digests_see_what_matters(tmp_path):
    for name, size in (("a.pth", 10), ("b.pth", 10**6)):
        (tmp_path / name).write_bytes(bytes(size))

    def digest(state=b"s"):
        return sampled_digest(str(tmp_path), ["b.pth", "a.pth"], state)

    first = digest()
    assert digest() == first != digest(b"t")
    for place in (0, 10**6 - 1):  # its ends are among the samples
        with open(tmp_path / "b.pth", "r+b") as f:
            f.seek(place)
            f.write(b"x")
        assert digest() != first
        first = digest()
    stops = Tokenizer([b"a", b"b"], {}, None, (1,), lambda text: [])
    other = Tokenizer([b"a", b"b"], {}, None, (0,), lambda text: [])
    joined = Tokenizer([b"ab", b""], {}, None, (1,), lambda text: [])
    begins = Tokenizer([b"a", b"b"], {}, None, (1,), lambda text: [], lambda text: [1])
    assert (
        len(
            {
                tokenizer_digest(ServedModel("x", each, 9, 2))
                for each in (stops, other, joined, begins)
            }
        )
        == 4
    )


BIG = """
import resource, sys
from pathlib import Path
from tests.batch_job.test_work import opened, worked, FakeEngine
folder, n = Path(sys.argv[1]), int(sys.argv[2])
with open(folder / "in", "w") as f:
    for i in range(n):
        f.write('{"custom_id": "%d", "prompt": [65, %d], "max_tokens": 2}\\n' % (i, i % 200))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
worked(opened(folder), FakeEngine(n_rows=32))
worked(opened(folder), FakeEngine(n_rows=32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("n", [5_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_long_file_does_not_sit_in_memory(tmp_path, n):
    done = subprocess.run(
        [sys.executable, "-c", BIG, str(tmp_path), str(n)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes().count(b"\n") == n
    grown_kib = int(done.stdout)
    assert grown_kib < 40_000 + n * 0.04, f"{grown_kib} KiB for {n} lines"


def test_a_full_disk_leaves_whole_lines(tmp_path, whole):
    """The kernel's own limit on a file's size stands in for the disk; SIGXFSZ is ignored by
    Python."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    job = opened(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, limit[1]))
    try:
        with pytest.raises(UserError, match="whole lines - make room"):
            worked(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    job.target.close()
    cut = (tmp_path / "out").read_bytes()
    assert whole.startswith(cut) and cut.endswith(b"}\n") and 0 < len(cut) <= len(whole) // 2
    worked(opened(tmp_path))
    assert (tmp_path / "out").read_bytes() == whole
