"""The server with real ranks: what clients see, above all when ranks die."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from llama_tp.arch.errors import UserError
from llama_tp.serve import check_names, check_origins
from tests.ranks import PATIENCE_S, ROOT, command, free_pair, is_alive
from tests.servers import DEMO, serving

FAULTS = str(Path(__file__).parent / "scripts" / "faults")
PROMPTS = ["ROMEO:", "JULIET:\nO ", "First Citizen:", "KING RICHARD III:"]


@pytest.fixture(scope="module")
def server():
    """One server on two ranks for the tests that leave it alive."""
    with serving("--nproc_per_node", "2", "--max_queue", "64", "--step_timeout", "6") as one:
        yield one
        assert one.end() == 0, one.stderr


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def wishes(n: int) -> list[dict]:
    """Requests of many kinds whose texts depend on every token before: penalties, stop strings,
    min_tokens, n, seeds."""
    kinds = [
        dict(temperature=0),
        dict(temperature=1.0, seed=3),
        dict(temperature=0.8, seed=4, frequency_penalty=1.0, n=2),
        dict(temperature=1.0, seed=5, stop=["\n\n", "the "], extra_body={"min_tokens": 40}),
        dict(temperature=1.0, seed=6, logprobs=2),
        dict(temperature=1.0, seed=7, presence_penalty=1.5, stop=["."]),
    ]
    return [
        dict(model="demo", prompt=PROMPTS[i % 4], max_tokens=150, **kinds[i % 6]) for i in range(n)
    ]


async def texts_of(url: str, wanted: list[dict], during=None) -> list:
    """Each request streamed, all at once -> (text, finish reason, logprobs) of each sample of
    each."""
    client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120)
    begun = asyncio.Event()

    async def one(wish: dict) -> list:
        samples = [["", None, []] for _ in range(wish.get("n", 1))]
        async for chunk in await client.completions.create(**wish, stream=True):
            for choice in chunk.choices:
                sample = samples[choice.index]
                assert sample[1] is None, "a choice ends once"
                sample[0] += choice.text
                sample[1] = choice.finish_reason
                sample[2] += choice.logprobs.token_logprobs if choice.logprobs else []
                if len(sample[0]) > 60:
                    begun.set()
        return samples

    async def disturb():
        await begun.wait()
        await asyncio.to_thread(during)

    async with client:
        jobs = [one(wish) for wish in wanted] + ([disturb()] if during else [])
        return (await asyncio.wait_for(asyncio.gather(*jobs), 200))[: len(wanted)]


@pytest.fixture(scope="module")
def calm(server):
    """What 32 streams say when nothing happens."""
    return asyncio.run(texts_of(server.url, wishes(32)))


@pytest.mark.parametrize(
    "rank, number",
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),  # as scripts/fake_rank.py dies
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_goes_costs_no_stream_a_character(rank, number, server, calm):
    """32 streams; every one ends with the text of an undisturbed run, and /health goes 503 and
    comes back."""
    seen, over = [], threading.Event()

    def watch():
        while not over.is_set():
            status = server.get("/health")[0]
            seen.extend([status] if seen[-1:] != [status] else [])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    ranks = server.ranks()
    n_before = server.stderr.count("starting them again")
    try:
        stormy = asyncio.run(texts_of(server.url, wishes(32), lambda: os.kill(ranks[rank], number)))
    finally:
        over.set()
        watcher.join()
    assert stormy == calm
    assert seen == [200, 503, 200]
    assert {choice[1] for samples in calm for choice in samples} == {"stop", "length"}
    assert len(server.ranks()) == 2 and not any(map(is_alive, ranks))
    assert server.stderr.count("starting them again") == n_before + 1
    assert "\nerror: " not in server.stderr and "Traceback" not in server.stderr


def test_a_rank_that_dies_at_every_start_ends_the_server_with_one_clear_error():
    with serving(
        "--nproc_per_node", "2", ready=False, env={"FAULT": "1:load:exit", "PYTHONPATH": FAULTS}
    ) as server:
        assert server.process.wait(PATIENCE_S) == 1
        errors = [line for line in server.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "rank 1" in errors[0] and "died during load" in errors[0], (
            server.stderr
        )
        assert "Traceback" not in server.stderr and not server.ranks()


@pytest.mark.slow
def test_ranks_that_cannot_come_back_end_the_server_with_one_clear_error(tmp_path):
    """The checkpoint is damaged while it serves; the stream in flight ends with an error of its
    own."""
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    with serving("--nproc_per_node", "2", "--max_restarts", "1", ckpt_dir=folder) as server:
        client = openai.OpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60
        )
        stream = client.completions.create(
            model="demo",
            prompt="O",
            max_tokens=500,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        shard = folder / "consolidated.01.pth"
        shard.write_bytes(shard.read_bytes()[:-1000])
        os.kill(server.ranks()[1], signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the ranks have ended"):
            for _ in stream:
                pass
        assert server.process.wait(PATIENCE_S) == 1
        errors = [line for line in server.stderr.splitlines() if line.startswith("error: ")]
        assert (
            len(errors) == 1
            and "the ranks ended 2 times" in errors[0]
            and "consolidated.01.pth" in errors[0]
        ), server.stderr
        assert not server.ranks()


@pytest.mark.parametrize("loading", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_killed_server_leaves_no_rank_behind(loading):
    with serving("--nproc_per_node", "2", ready=not loading) as server:
        while len(ranks := server.ranks()) < 2:
            time.sleep(0.05)
        time.sleep(1.5 if loading else 0)  # they import torch, and then find nobody to connect to
        server.process.kill()
        while any(map(is_alive, ranks)) or server.ranks():
            time.sleep(0.05)


@pytest.mark.slow
def test_two_nodes_and_a_death_on_the_other():
    """Two launchers on one host; the other node runs the line that the server prints, again when it
    ends."""
    port, over = free_pair(), threading.Event()
    with serving(
        "--nproc_per_node",
        "1",
        "--nnodes",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
        ready=False,
    ) as server:
        server.wait_for("on node 1 run, again whenever it ends: ")
        line = server.stderr.partition("whenever it ends: ")[2].splitlines()[0].split()
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LLAMA_TP_THREADS": "1",
            "LLAMA_TP_TEST_JOB": server.mark,
        }

        def node():
            while not over.is_set():
                subprocess.run(
                    [sys.executable, *line[1:]], cwd=ROOT, env=env, timeout=240, capture_output=True
                )

        other = threading.Thread(target=node)
        other.start()
        try:
            server.wait_listening()
            server.wait_ready()
            wanted = [{**wish, "max_tokens": 60} for wish in wishes(8)]
            calm = asyncio.run(texts_of(server.url, wanted))
            ranks = server.ranks()
            assert (
                asyncio.run(texts_of(server.url, wanted, lambda: os.kill(ranks[1], signal.SIGKILL)))
                == calm
            )
            assert "starting them again" in server.stderr
            over.set()
            server.process.terminate()
            assert server.process.wait(PATIENCE_S) == 0, server.stderr
        finally:
            over.set()
            server.process.kill()
            other.join(60)


# Clients, on a server that lives.


def test_chat_and_completions(client, server):
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Who are you?"}],
        max_tokens=12,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].message.role == "assistant" and len(chat.choices[0].message.content) > 5
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens == 12
    text = client.completions.create(
        model="demo", prompt=["ROMEO:", "JULIET:"], n=2, seed=1, max_tokens=8
    )
    assert [choice.index for choice in text.choices] == [
        0,
        1,
        2,
        3,
    ] and text.usage.completion_tokens == 32
    assert [model.id for model in client.models.list()] == ["demo"]
    assert (
        "server: what requests do not say: temperature 1, top_p 1 (as OpenAI has them)\n"
        in server.stderr
    )
    assert server.post("/tokenize", {"prompt": "ROMEO:"})[1]["max_model_len"] == 512


def test_streams_say_what_whole_replies_say(client):
    for wish in wishes(6):
        wish = {**wish, "max_tokens": 40, "extra_body": {}}
        whole = client.completions.create(**wish)
        texts = [""] * wish.get("n", 1)
        for chunk in client.completions.create(
            **wish, stream=True, stream_options={"include_usage": True}
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices] and chunk.usage == whole.usage


def test_scoring_an_echoed_prompt_of_token_ids(client, server):
    ids = server.post(
        "/tokenize", {"prompt": "But soft, what light through yonder window breaks?"}
    )[1]["tokens"]
    reply = client.completions.create(
        model="demo", prompt=[ids, ids[:9]], max_tokens=1, temperature=0, logprobs=1, echo=True
    )
    for choice, n in zip(reply.choices, (len(ids), 9)):
        assert len(choice.logprobs.tokens) == n + 1 and choice.logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert (
        reply.choices[0].logprobs.token_logprobs[:9] == reply.choices[1].logprobs.token_logprobs[:9]
    )


def test_a_client_that_goes_frees_its_blocks_at_once(client, server):
    before = server.n_aborted()
    stream = client.completions.create(
        model="demo", prompt="O", n=20, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert json.loads(server.get("/load")[2])["running"] > 0
    stream.close()
    with pytest.raises(openai.APITimeoutError):  # the same for one that does not stream
        client.with_options(timeout=0.3).completions.create(
            model="demo", prompt="O", n=20, max_tokens=500, extra_body={"ignore_eos": True}
        )
    assert server.wait_idle()["kv_use"] == 0.0
    assert server.n_aborted() == before + 40  # none ran to its end


MEASURE = """
import sys, time, urllib.request
for _ in range(60):
    started = time.monotonic()
    assert urllib.request.urlopen(sys.argv[1] + "/health").status == 200
    print(time.monotonic() - started)
    time.sleep(0.02)
"""


def test_health_answers_at_once_under_full_load(server):
    """Streams in every row, a queue behind them, and texts of 4 MB to tokenize, one after the
    other. Measured by a process that does nothing else: 9 of 10 answers wait for no text to be
    done, however long this machine takes over one just now."""
    big, over = json.dumps({"prompt": "wherefore " * 400_000}).encode(), threading.Event()
    statuses, texts_s, times = set(), [], []

    def flood():
        while not over.is_set():
            started = time.monotonic()
            statuses.add(server.request("/tokenize", big, {"Content-Type": "application/json"})[0])
            texts_s.append(time.monotonic() - started)

    def measure():
        flooding = threading.Thread(target=flood)
        flooding.start()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, server.url], capture_output=True, text=True, timeout=60
        )
        over.set()
        flooding.join()
        times.extend(sorted(map(float, done.stdout.split())))

    asyncio.run(texts_of(server.url, wishes(60), measure))
    assert (
        statuses == {200}
        and len(times) == 60
        and times[54] < sorted(texts_s)[len(texts_s) // 2] / 2
    ), (times, texts_s)


def test_a_full_queue_is_429_with_retry_after(server):
    """500 streams at once on 32 rows and a queue of 64: each finishes or gets 429, none anything
    else."""

    async def main():
        client = openai.AsyncOpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120
        )

        async def one(i: int):
            try:
                reply = await client.completions.create(
                    model="demo", prompt=PROMPTS[i % 4], max_tokens=30, temperature=0
                )
                return reply.choices[0].text
            except openai.RateLimitError as error:
                assert (
                    error.response.headers["retry-after"] == "1"
                    and error.code == "rate_limit_exceeded"
                )
                return None

        async with client:
            return await asyncio.gather(*[one(i) for i in range(300)])

    texts = asyncio.run(main())
    assert 96 <= sum(text is not None for text in texts) < 300
    alone = [
        asyncio.run(
            texts_of(server.url, [dict(model="demo", prompt=prompt, max_tokens=30, temperature=0)])
        )[0][0][0]
        for prompt in PROMPTS
    ]
    assert all(text in (None, alone[i % 4]) for i, text in enumerate(texts))


# Before anything heavy.


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["--ckpt_dir", "no/such/folder"], 1, "no/such/folder"),
        (["--ckpt_dir", "checkpoints/demo", "--nproc_per_node", "3"], 1, "3"),
        (["--ckpt_dir", "checkpoints/demo", "--port", "99999"], 1, "--port is out of range"),
        (["--ckpt_dir", "checkpoints/demo", "--nnodes", "2"], 1, "--master_addr"),
        (
            ["--ckpt_dir", "checkpoints/demo", "--host", "no.such.host.invalid"],
            1,
            "cannot listen at no.such.host.invalid",
        ),
    ],
)
def test_a_bad_launch_is_one_line(words, code, says):
    done = command("serve", *words)
    assert done.returncode == code and done.stderr.startswith("error: ") and says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(server):
    port = server.url.rpartition(":")[2]
    done = command("serve", "--ckpt_dir", str(DEMO), "--port", port)
    assert done.returncode == 1 and f"cannot listen at 127.0.0.1:{port}" in done.stderr


def test_torchrun_is_not_the_way_to_start_it():
    done = command("serve", "--ckpt_dir", str(DEMO), env={"RANK": "0"})
    assert done.returncode == 1 and "serve starts its ranks itself" in done.stderr


def test_names_and_origins_that_nobody_could_send():
    for names in (("",), (" ",), ("a", "b", "a"), ("a\n",), ("a" * 1001,)):
        with pytest.raises(UserError, match="--served_model_name needs names"):
            check_names(names)
    check_names(("demo", "org/name", "gpt-4o"))
    for origin in (
        "https://a.example/",
        "a.example",
        "https://",
        "https://a.example/x",
        "https://a, https://b",
        "null",
        "",
    ):
        with pytest.raises(UserError, match="--allow_origins needs origins"):
            check_origins(("http://localhost:3000", origin))
    check_origins(
        (
            "*",
            "https://a.example",
            "http://localhost:3000",
            "http://[::1]:8000",
            "chrome-extension://abcdef",
        )
    )


@pytest.mark.parametrize(
    "words, env, says",
    [
        (["--api_key", ""], {}, "an API key must be"),
        ([], {"LLAMA_TP_API_KEY": "k\u00e9y"}, "an API key must be"),
        (["--max_gen_len", "-1"], {}, "--max_gen_len must be"),
        (["--served_model_name", "a", "a"], {}, "--served_model_name needs"),
        (["--generation_config", "README.md"], {}, "README.md is not valid JSON"),
        (["--allow_origins", "https://a.example/"], {}, "--allow_origins needs origins"),
        (["--ckpt_dir", "checkpoints/none"], {}, "--ckpt_dir checkpoints/none is no folder"),
        (["--ckpt_dir", "README.md"], {}, "--ckpt_dir README.md is no folder - it is a file"),
    ],
)
def test_what_cannot_be_served_is_told_at_once(words, env, says):
    demo = [] if "--ckpt_dir" in words else ["--ckpt_dir", str(DEMO)]
    done = command("serve", "--port", "0", *words, *demo, env=env)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stderr.count("\n") == 1
