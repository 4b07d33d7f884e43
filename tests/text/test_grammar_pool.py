"""Forms tried in processes with limits: hostile ones are refused by name, and honest ones do not
wait for them."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.text.grammar import Form, json_object, json_schema, regex
from llama_tp.text.grammar_pool import N_SLOW, Busy, GrammarPool, start_message, wait_for
from llama_tp.text.token_table import Tokenizer
from tests.ranks import children, is_alive

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llama_tp[serve]'")

# Each is made without the check of its size, or gets past it.
SLOW = Form("regex", "(a?){30000}a{30000}")
HUNGRY = Form("regex", "a{9000000}")
SLOW_TO_COMPILE = json_schema(
    {"type": "string", "allOf": [{"pattern": f"a{{{i}}}"} for i in range(1, 300)]}
)


@pytest.fixture(scope="module")
def pool(tiny):
    pool = GrammarPool(tiny, cpu_s=0.5)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "form, says",
    [
        (SLOW, "takes too much to follow.*0.5 s of computing or 256 MB"),
        (HUNGRY, "takes too much"),
        (SLOW_TO_COMPILE, "takes too much"),
        (Form("regex", "("), "not understood.*unclosed group"),
        (regex(".*" * 300), "too many expressions"),
        (
            Form("lark", 'start: "a" x{60000}\nx: "b"'),
            "Too many items",
        ),  # found out one token later
    ],
)
def test_what_cannot_be_followed_is_said(form, says, pool):
    with pytest.raises(UserError, match=says):
        pool.try_form(form)
    pool.try_form(json_object())


def test_memory_has_a_limit_of_its_own(tiny):
    pool = GrammarPool(tiny, cpu_s=60)
    started = time.monotonic()
    with pytest.raises(UserError, match="takes too much"):
        pool.try_form(HUNGRY)
    assert time.monotonic() - started < 30
    pool.close()


def test_a_form_that_is_good_is_tried_once(pool):
    def seconds() -> float:
        started = time.monotonic()
        pool.try_form(regex("once[0-9]{9}"))
        return time.monotonic() - started

    assert seconds() > 20 * min(seconds() for _ in range(3))


def test_honest_forms_get_past_hostile_ones(pool):
    """Twenty hostile forms at once: all are refused, some because others are looked at, and an
    honest one is through before them."""
    pool.try_form(regex("a"))
    with ThreadPoolExecutor(24) as threads:
        ends: list[tuple[str, str]] = []
        lock = threading.Lock()

        def one(name: str, form: Form) -> None:
            try:
                pool.try_form(form)
                said = "good"
            except UserError as error:
                said = type(error).__name__
            with lock:
                ends.append((name, said))

        for i in range(20):
            threads.submit(one, "hostile", Form("regex", f"(a?){{30000}}a{{{30000 + i}}}"))
        for i in range(3):
            threads.submit(one, "honest", regex(f"[0-9]{{{5 + i}}}"))
    assert sorted(said for name, said in ends if name == "honest") == ["good"] * 3
    hostile = [said for name, said in ends if name == "hostile"]
    assert (
        set(hostile) <= {Busy.__name__, "UserError"}
        and 1 <= hostile.count("UserError") <= 20 - N_SLOW
    )
    assert ends[-1][0] == "hostile"  # the honest ones did not wait for the last of them


def test_killed_processes_are_replaced(pool):
    pool.try_form(regex("before"))
    server = pool._server.pid
    os.kill(server, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_alive(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    for i in range(5):
        pool.try_form(regex(f"after{i}"))
    assert pool._server.pid != server


def test_nothing_is_left_behind(tiny):
    pool = GrammarPool(tiny)
    pool.try_form(regex("a"))
    out = pool.take()
    processes = [pool._server.pid, *children(pool._server.pid)]
    assert len(processes) >= 3
    pool.close()
    pool.close()
    deadline = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, processes))
    out.kill()


def test_a_worker_needs_neither_its_ranks_cpus_nor_its_threads(pool):
    pool.try_form(regex("a"))
    assert os.sched_getaffinity(pool._server.pid) == os.sched_getaffinity(os.getppid())
    for pid in [pool._server.pid, *children(pool._server.pid)]:
        status = dict(
            line.split(":\t", 1)
            for line in open(f"/proc/{pid}/status").read().splitlines()
            if ":\t" in line
        )
        assert int(status["Threads"]) == 1 and "torch" not in open(f"/proc/{pid}/maps").read()


def test_short_of_memory_the_kernel_ends_workers_first(pool):
    """Each has a limit, all of them together have none."""
    worker = pool.take()
    worker.send(start_message(regex("a+"), [(0, [])]))
    while not worker.take():
        wait_for([worker], 1.0)
    scores = [
        int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (worker.pid, os.getpid())
    ]
    pool.give(worker)
    assert scores[0] == 1000 > scores[1]


def test_what_other_processes_cannot_open_is_refused():
    letters = Tokenizer([bytes([i]) for i in range(256)], {}, None, (0,), list)
    with pytest.raises(UserError, match="needs a tokenizer that other processes can open"):
        GrammarPool(letters)
