"""Everything hostile at once, beside eight streams that are not: these never pause, and afterwards
all is as before."""

import asyncio
import collections
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT, marked
from tests.servers import SCRIPTS, serving

N_BODIES, N_FORMS, N_SILENT, N_UNREAD, N_CANCELLED, N_HONEST = 200, 100, 200, 50, 500, 8
STORM_S = 20  # for which those stay that do nothing
PAUSE_S = 2.0  # of an honest stream, at most
SETTLE_S = 40  # in which all comes back to what it was
BODY_BYTES = 8 << 20

# What is cheap to ask for and dear to follow; each also as a pattern in a JSON schema and as a
# grammar.
REGEXES = [
    "(a?){30000}a{30000}",
    "(a?){3000}a{3000}",
    "a{1000000}",
    "((a?){300}){300}",
    ".*" * 3000,
    "(.*a){2000}",
    "(a|b|ab)*c{200000}",
]
FORMS = [
    form
    for one in REGEXES
    for form in (
        {"regex": one},
        {"grammar": f"start: /{one}/"},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "string", "pattern": one}},
            }
        },
    )
]


def filled(head: str, unit: str, tail: str) -> bytes:
    """As many `unit`s as make a body of BODY_BYTES."""
    n = (BODY_BYTES - len(head) - len(tail)) // len(unit)
    return (head + (unit * n).rstrip(",") + tail).encode()


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES = [
    (COMPLETIONS, *each)
    for each in [
        ('{"prompt":"', "wherefore ", '"}'),
        ('{"prompt":"', "\\u00e9", '"}'),
        ('{"prompt":"', "\\ud83d", '"}'),
        ('{"prompt":[', "11,", "]}"),
        ('{"prompt":[', "[],", "]}"),
        ('{"prompt":[', "[1],", "]}"),
        ('{"prompt":[', '"",', "]}"),
        ('{"prompt":[', "1.5,", "]}"),
        ('{"prompt":[', "[],", ""),
        ('{"prompt":"x","stop":[', '"a",', "]}"),
        ('{"prompt":"x","stop":"', "a", '"}'),
        ('{"prompt":"x","stop_token_ids":[', "1,", "]}"),
        ('{"prompt":"x","logit_bias":{', '"1":"x",', "}}"),
        ('{"prompt":', "1", "}"),
        ('{"prompt":"x","n":[', "1,", "]}"),
        ('{"prompt":"x","a":', "[", ""),
        ("", "\xff", ""),
    ]
]
BODIES += [
    (CHAT, *each)
    for each in [
        ('{"messages":[', "1,", "]}"),
        ('{"messages":[', "{},", "]}"),
        ('{"messages":[', '{"role":"user","content":"x"},', "]}"),
        ('{"messages":[{"role":"user","content":[', '{"type":"text","text":"x"},', "]}]}"),
        ('{"messages":[{"role":"user","content":"x"}],"tools":[', "{},", "]}"),
        ('{"messages":[{"role":[', "1,", "]}]}"),
        ('{"messages":[{"role":"user","content":"x"}],"response_format":{"type":[', "1,", "]}}"),
    ]
]


class Storm:
    """What hostile clients do; `statuses` of those that wait for an answer, by kind."""

    def __init__(self, url: str):
        self.host, _, port = url.removeprefix("http://").partition(":")
        self.port, self.until = int(port), time.monotonic() + STORM_S
        self.statuses: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    async def all(self) -> None:
        jobs = [self.body(i) for i in range(N_BODIES)] + [self.silent(i) for i in range(N_SILENT)]
        jobs += [self.form(i) for i in range(N_FORMS)] if FORMS else []
        jobs += [self.unread() for _ in range(N_UNREAD)] + [
            self.cancelled(i) for i in range(N_CANCELLED)
        ]
        random.Random(1).shuffle(jobs)
        await asyncio.wait_for(asyncio.gather(*jobs), 240)

    @contextlib.asynccontextmanager
    async def connected(self, path: str, body: bytes, n_bytes: int | None = None):
        """A connection on which a request with `body` has begun (its head says `n_bytes`)."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        with contextlib.suppress(ConnectionError):  # refused, or given up, while it was sent
            head = (
                f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: "
                "close\r\n"
                if path
                else ""
            )
            writer.write(
                (head + f"Content-Length: {n_bytes or len(body)}\r\n\r\n" if head else "").encode()
            )
            for i in range(0, len(body), 1 << 18):
                writer.write(body[i : i + (1 << 18)])
                await writer.drain()
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def answered(self, kind: str, path: str, body: bytes) -> None:
        async with self.connected(path, body) as (reader, _):
            line = b""
            with contextlib.suppress(ConnectionError):
                line = await reader.readline()
                while await reader.read(1 << 16):
                    pass
            self.statuses[kind][int(line.split()[1]) if line else 0] += 1

    async def body(self, i: int) -> None:
        path, *parts = BODIES[i % len(BODIES)]
        if i % 10:
            await self.answered("body", path, filled(*parts))
            return
        async with self.connected(path, b"{", BODY_BYTES) as (_, writer):  # one that takes its time
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < self.until:
                    writer.write(b" " * 1000)
                    await writer.drain()
                    await asyncio.sleep(0.5)

    async def form(self, i: int) -> None:
        wish = {"max_tokens": 5, **FORMS[i % len(FORMS)]}
        path, asked = (
            (CHAT, {"messages": [{"role": "user", "content": "x"}]})
            if i % 2
            else (COMPLETIONS, {"prompt": "x"})
        )
        await self.answered("form", path, json.dumps(wish | asked).encode())

    async def silent(self, i: int) -> None:
        said = [
            b"",
            b"GET /health HTTP/1.1\r\nX-",
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST",
        ][i % 4]
        async with self.connected("", said):
            await asyncio.sleep(self.until - time.monotonic())

    async def unread(self) -> None:
        wish = {
            "messages": [{"role": "user", "content": "x"}],
            "n": 4,
            "max_tokens": 450,
            "logprobs": True,
            "top_logprobs": 20,
            "ignore_eos": True,
            "stream": True,
        }
        async with self.connected(CHAT, json.dumps(wish).encode()) as (_, writer):
            writer.transport.pause_reading()
            await asyncio.sleep(self.until - time.monotonic())

    async def cancelled(self, i: int) -> None:
        await asyncio.sleep(i % 50 / 10)
        wish = {
            "prompt": "x" * (1 + i % 7 * 30),
            "n": 1 + i % 3,
            "max_tokens": 400,
            "stream": i % 2 == 0,
        }
        async with self.connected(COMPLETIONS, json.dumps(wish).encode()):
            await asyncio.sleep(i % 11 / 20)


def use_of(server) -> dict[str, int]:
    """What the server and its ranks hold: RSS in MB, open files, threads; how many processes they
    are."""
    found = collections.Counter()
    for pid in marked(f"LLAMA_TP_TEST_JOB={server.mark}"):
        with contextlib.suppress(OSError):
            status = dict(
                line.split(":\t", 1)
                for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                if ":\t" in line
            )
            found += {
                "mb": int(status["VmRSS"].split()[0]) >> 10,
                "files": len(os.listdir(f"/proc/{pid}/fd")),
                "threads": int(status["Threads"]),
                "processes": 1,
            }
    return dict(found)


def grown(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    """What is more than a tenth (and 50 MB, and two) above what it was."""
    return {
        name: now[name]
        for name, was in before.items()
        if now[name] > 1.1 * was + (50 if name == "mb" else 2)
    }


@contextlib.contextmanager
def honest(url: str):
    """Eight streams beside what happens inside; a dict that holds what they saw, afterwards."""
    command = [sys.executable, str(SCRIPTS / "honest_streams.py"), url, str(N_HONEST)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    seen: dict = {}
    try:
        time.sleep(2)
        yield seen
        seen |= json.loads(process.communicate("", timeout=60)[0])
    finally:
        process.kill()


@pytest.mark.slow
def test_a_storm_beside_honest_streams():
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 1 << 14), most))
    with serving("--nproc_per_node", "2", "--step_timeout", "60") as server:

        def blow() -> tuple[Storm, dict]:
            storm = Storm(server.url)
            with honest(server.url) as seen:
                asyncio.run(storm.all())
            return storm, seen

        blow()  # caches, compilations, the allocator's reserves
        time.sleep(5)
        before = use_of(server)
        storm, seen = blow()
        deadline = time.monotonic() + SETTLE_S
        while (left := grown(before, use_of(server))) and time.monotonic() < deadline:
            time.sleep(0.5)
        print(
            before,
            use_of(server),
            {kind: dict(each) for kind, each in storm.statuses.items()},
            {
                name: value if isinstance(value, int) else sorted(value)[-3:]
                for name, value in seen.items()
            },
        )
        assert not left, (before, left)
        assert (
            seen["n_broken"] == 0
            and len(seen["pauses"]) >= N_HONEST
            and max(seen["pauses"]) < PAUSE_S
        ), seen
        for kind, statuses in storm.statuses.items():
            # 0: reset as it still sent
            assert set(statuses) <= {0, 200, 400, 408, 413, 429}, (kind, statuses)
            assert statuses[400], (kind, statuses)
        assert "starting them again" not in server.stderr and "Traceback" not in server.stderr, (
            server.stderr[-3000:]
        )
        assert server.log.stat().st_size < 1 << 20
        assert (
            server.get("/health")[0] == 200
            and json.loads(server.get("/load")[2])["server_load"] == 0
        )
        assert server.end() == 0
