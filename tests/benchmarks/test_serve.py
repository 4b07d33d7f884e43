"""bench serve against a server whose delays and answers are known: counts exactly, times by what
holds on any busy machine."""

import json
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.benchmarks import served
from llama_tp.benchmarks.serve import WORDS, Load, limits_of, measure, prompts_in
from llama_tp.benchmarks.served import DETAILS, Outcome, percentile, result_of
from tests.fake_openai import FakeServer
from tests.ranks import command

pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]


def run(server, **settings):
    said = []
    result = measure(
        Load(**{"url": server.url, "n_requests": 6, "output_len": 4, "spread": 0.0, **settings}),
        said.append,
    )
    result["said"] = said
    return result


def test_counts_and_times_of_a_whole_load():
    with FakeServer(first_s=0.05, gap_s=0.02) as server:
        result = run(server, concurrency=2, api_key="secret", goodput={"ttft": 60_000.0})
    assert len(server.requests) == 7 and server.most <= 2  # one to see whether it answers
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer secret"}
    body = server.requests[-1][2]
    assert (
        body["model"] == "fake-1"
        and body["max_tokens"] == 4
        and body["stream"]
        and body["ignore_eos"] is True
    )
    assert result["completed"] == 6 and result["failed"] == 0 and result["errors"] == [""] * 6
    assert result["total_input_tokens"] == 42 and result["total_output_tokens"] == 24 == sum(
        result["output_lens"]
    )
    assert result["generated_texts"] == ["one two three four"] * 6
    assert all(ttft >= 0.05 for ttft in result["ttfts"]) and all(
        len(itls) == 3 and min(itls) >= 0 for itls in result["itls"]
    )
    for ttft, itls, latency in zip(result["ttfts"], result["itls"], result["latencies"]):
        assert latency == pytest.approx(ttft + sum(itls), abs=1e-6) and latency >= 0.05 + 3 * 0.02
    assert result["duration"] >= 3 * 0.11  # six requests, two at a time
    assert result["output_throughput"] == pytest.approx(24 / result["duration"])
    assert (
        result["request_goodput"]
        == pytest.approx(result["request_throughput"])
        == pytest.approx(6 / result["duration"])
    )
    assert result["max_concurrent_requests"] <= 2 and 4 <= result["max_output_tokens_per_s"] <= 24
    for kind in ("ttft", "tpot", "itl", "e2el"):
        assert (
            0 < result[f"median_{kind}_ms"] <= result[f"p99_{kind}_ms"]
            and result[f"std_{kind}_ms"] >= 0
        )
    assert result["mean_tpot_ms"] >= 20 and any("6 of 6 done" in line for line in result["said"])


def test_keys_are_those_of_vllm_bench_serve():
    with FakeServer() as server:
        result = run(server)
    keys = """duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
        total_token_throughput input_lens output_lens ttfts itls latencies start_times queue_times generated_texts errors
        max_output_tokens_per_s max_concurrent_requests date backend model_id num_prompts request_rate max_concurrency""".split()  # noqa: E501
    keys += [
        f"{name}_{kind}_ms"
        for name in ("mean", "median", "std", "p99")
        for kind in ("ttft", "tpot", "itl", "e2el")
    ]
    assert set(keys) | {"said"} == set(result)
    assert result["request_rate"] == "inf" and result["request_goodput"] is None
    summary = json.loads(json.dumps(served.summary(result)))
    assert summary["completed"] == 6 and not set(DETAILS) & set(summary)


def test_chat_and_prompts_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text('first\n\n{"prompt": "second\\nline"}\n')
    with FakeServer() as server:
        result = run(
            server,
            chat=True,
            prompts_file=str(tmp_path / "p.txt"),
            ignore_eos=False,
            n_requests=4,
            model="m",
        )
    path, _, body = server.requests[1]
    assert path == "/v1/chat/completions" and "ignore_eos" not in body and body["model"] == "m"
    asked = sorted(body["messages"][0]["content"] for _, _, body in server.requests[1:])
    assert asked == ["first", "first", "second\nline", "second\nline"]
    assert (
        result["generated_texts"] == ["one two three four"] * 4
        and result["backend"] == "openai-chat"
    )


def test_random_prompts_repeat_with_the_seed_and_have_their_length():
    def prompts(**settings):
        with FakeServer(tokenize=settings.pop("tokenize", False)) as server:
            run(server, input_len=50, spread=0.4, **settings)
            return [body["prompt"] for _, _, body in server.requests[1:]]

    one = prompts(concurrency=1)
    assert one == prompts(concurrency=1) != prompts(concurrency=1, seed=2)
    assert (
        all(30 <= len(prompt.split()) <= 70 and set(prompt.split()) <= set(WORDS) for prompt in one)
        and len(set(one)) == 6
    )
    # its tokens are characters
    assert all(30 <= len(prompt) <= 70 for prompt in prompts(tokenize=True))


def test_requests_come_at_their_rate():
    with FakeServer() as server:
        result = run(server, n_requests=20, request_rate=100.0)
    draw = random.Random(1)
    for _ in range(20):  # what else the seed decides: words, and two lengths each
        draw.uniform(0, 1), draw.choices(WORDS, k=128), draw.uniform(0, 1)
    turn = 0.0
    for start, queue in zip(result["start_times"], result["queue_times"]):
        assert start >= turn - 1e-3 and queue == pytest.approx(start - turn, abs=1e-3)
        turn += draw.expovariate(100.0)


def test_any_text_is_counted():
    with FakeServer(pieces=["a\u2028", "\u2029b", "\x85", "é"]) as server:
        result = run(server)
    assert result["failed"] == 0 and result["generated_texts"] == ["a\u2028\u2029b\x85é"] * 6


@pytest.mark.parametrize(
    "ending, says", [("error", "a rank died"), ("cut", r"without \[DONE\]|RemoteProtocolError")]
)
def test_what_breaks_in_mid_stream_has_failed(ending, says):
    with FakeServer(ending=ending, n_good=4) as server:
        result = run(server, concurrency=1)
    assert (
        result["completed"] == 3 and result["failed"] == 3 and result["total_output_tokens"] == 12
    )
    assert result["errors"][:3] == [""] * 3
    for error in result["errors"][3:]:
        assert re.search(says, error)
    assert len(result["ttfts"]) == 6


def test_a_stream_that_falls_silent_times_out():
    with (
        FakeServer(first_s=30.0) as server,
        pytest.raises(UserError, match="refuses a first request.*ReadTimeout"),
    ):
        run(server, timeout_s=0.3)


def test_refusals_are_counted_and_nothing_but_refusals_is_an_error():
    with FakeServer(refusal=(429, "queue full"), n_good=4) as server:
        result = run(server, concurrency=1)
    assert result["failed"] == 3 and all(
        error.startswith("HTTP 429") and "queue full" in error for error in result["errors"][3:]
    )
    with FakeServer(refusal=(429, "queue full"), n_good=1) as server:
        with pytest.raises(UserError, match="every request failed.*queue full"):
            run(server)
    with (
        FakeServer(refusal=(400, "ignore_eos is not known")) as server,
        pytest.raises(UserError, match="ignore_eos is not known"),
    ):
        run(server)


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="no OpenAI-compatible server at http://127"):
        measure(Load(url), print)
    with pytest.raises(UserError, match="no OpenAI-compatible server at http://"):
        measure(Load("http://[::1"), print)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"url": "127.0.0.1:8000"}, "not the address"),
        ({"n_requests": 0}, "--n_requests must be above 0"),
        ({"request_rate": -1.0}, "--request_rate must be above 0"),
        ({"concurrency": 0}, "--concurrency"),
        ({"spread": 1.0}, "--spread"),
        ({"api_key": "k\u00e9y"}, "API key"),
    ],
)
def test_loads_that_make_no_sense(settings, says):
    with pytest.raises(UserError, match=says):
        Load(**{"url": "http://x", **settings})


def test_lines_of_a_prompts_file_end_where_lines_end(tmp_path):
    (tmp_path / "p").write_bytes('\ufeff{"prompt": "a\u2028b"}\r\nc\u2028d\n'.encode())
    assert prompts_in(str(tmp_path / "p")) == ["a\u2028b", "c\u2028d"]


def test_goodput_and_prompt_files_that_make_no_sense(tmp_path):
    assert (
        limits_of(("ttft:200", "tpot:50.5")) == {"ttft": 200.0, "tpot": 50.5}
        and limits_of(()) == {}
    )
    for wrong in ("ttft", "ttft:x", "ttft:0", "speed:3", "ttft:1:2"):
        with pytest.raises(UserError, match="--goodput needs NAME:MS"):
            limits_of((wrong,))
    for text in ("", "\n\n", '{"prompt": 3}', '{"text": "a"}', "{"):
        (tmp_path / "p").write_text(text)
        with pytest.raises(UserError, match="--prompts_file"):
            prompts_in(str(tmp_path / "p"))


TIMES = st.floats(0.001, 10)
OUTCOMES = st.lists(
    st.builds(
        lambda start, ttft, itls, error: Outcome(
            start, 0.0, ttft, ttft + sum(itls), itls, "x", 3, len(itls) + 1, error
        ),
        TIMES,
        TIMES,
        st.lists(TIMES, max_size=5),
        st.sampled_from(["", "", "", "broken"]),
    ),
    min_size=1,
    max_size=12,
)


@given(outcomes=OUTCOMES, limit=TIMES)
def test_numbers_of_any_outcomes_hang_together(outcomes, limit):
    numpy = pytest.importorskip("numpy")
    result = result_of(outcomes, 20.0, {"ttft": 1e3 * limit})
    good = [one for one in outcomes if not one.error]
    assert result["completed"] == len(good) and result["completed"] + result["failed"] == len(
        outcomes
    )
    assert result["request_goodput"] == sum(one.ttft <= limit for one in good) / 20
    assert result["total_token_throughput"] == pytest.approx(
        result["output_throughput"] + result["total_input_tokens"] / 20
    )
    assert (
        result["max_concurrent_requests"] <= len(good)
        and result["max_output_tokens_per_s"] <= result["total_output_tokens"]
    )
    all_times = {
        "ttft": [one.ttft for one in good],
        "itl": [gap for one in good for gap in one.itls],
        "e2el": [one.latency for one in good],
        "tpot": [sum(one.itls) / len(one.itls) for one in good if one.itls],
    }
    for kind, times in all_times.items():
        ms = 1e3 * numpy.array(times or [0.0])
        found = [result[f"{name}_{kind}_ms"] for name in ("mean", "median", "std", "p99")]
        assert found == pytest.approx(
            [ms.mean(), numpy.median(ms), ms.std(), numpy.percentile(ms, 99)]
        )
    assert all(isinstance(table, list) for table in served.tables(result))


def test_percentile_is_numpys():
    numpy = pytest.importorskip("numpy")
    values = [random.Random(0).random() for _ in range(37)]
    for percent in (0, 1, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))


def test_the_command_prints_tables_and_json_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    with FakeServer(gap_s=0.005) as server:
        done = subprocess.run(
            [
                sys.executable,
                "-X",
                "importtime",
                "-m",
                "llama_tp.bench",
                "serve",
                "--url",
                f"{server.url}/v1",
                "--n_requests",
                "5",
                "--output_len",
                "3",
                "--spread",
                "0",
                "--goodput",
                "ttft:60000",
                "--save",
                str(tmp_path / "r.json"),
                "--plot",
                str(tmp_path / "r.png"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert (
        "| output tok / s |" in done.stdout
        and "TTFT" in done.stdout
        and "good requests / s" in done.stdout
    )
    printed, saved = (
        json.loads(done.stdout.splitlines()[-1]),
        json.loads((tmp_path / "r.json").read_text()),
    )
    assert printed["completed"] == 5 and printed["total_output_tokens"] == 15
    assert saved["output_lens"] == [3] * 5 and {key: saved[key] for key in printed} == printed
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    imported = {
        line.rsplit("|", 1)[-1].strip()
        for line in done.stderr.splitlines()
        if "import time:" in line
    }
    assert "httpx" in imported and "torch" not in imported


@pytest.mark.parametrize(
    "words, says",
    [
        (
            ["serve", "--url", "http://x", "--plot", "/no/where/x.png"],
            "--plot /no/where/x.png cannot be written",
        ),
        (
            ["serve", "--url", "http://x", "--save", "/no/where"],
            "--save /no/where cannot be written",
        ),
        (["serve", "--url", "http://x", "--plot", "x.txt"], "--plot draws a .png or .svg"),
        (
            ["latency", "--ckpt_dir", "checkpoints/demo", "--beside", "/no/where"],
            "--beside /no/where cannot be read",
        ),
        (["serve"], "found no --url"),
        (["serve", "--url", "http://x", "--ckpt_dir", "d"], "found --ckpt_dir"),
        (["latency", "--url", "http://x"], "--url is for serve"),
        (["serve", "--url", "x"], "not the address"),
    ],
)
def test_the_command_refuses(words, says):
    done = command("bench", *words)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
