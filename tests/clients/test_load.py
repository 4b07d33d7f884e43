"""A load of real streams: 500 at once, clients that go away among them, again and again, and what
memory does meanwhile."""

import asyncio
import os
import random
import time
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.ranks import PATIENCE_S
from tests.servers import serving

N_STREAMS, MAX_QUEUE = 500, 400  # 32 run and 400 wait: the rest gets 429
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SPEAKERS = (
    "ROMEO",
    "JULIET",
    "First Citizen",
    "KING RICHARD III",
    "Nurse",
    "MENENIUS",
    "GLOUCESTER",
    "All",
)
WISHES = [
    dict(model="demo", prompt=f"{name}:\n{word}", max_tokens=12 + 4 * i, **kind)
    for i, name in enumerate(SPEAKERS)
    for word in ("O", "Why,")
    for kind in (dict(temperature=0), dict(temperature=1.0, seed=i, frequency_penalty=0.5))
]


async def one(client: openai.AsyncOpenAI, number: int, leaves: bool) -> str | int | None:
    """The text of a stream; 429; None if the client went away in its middle."""
    wish, text = WISHES[number % len(WISHES)], []
    try:
        async with await client.completions.create(**wish, stream=True) as stream:
            async for chunk in stream:
                text.append(chunk.choices[0].text)
                if leaves:
                    return None
    except openai.RateLimitError as error:
        assert error.response.headers["retry-after"]
        return 429
    return "".join(text)


async def wave(url: str, leavers: bool) -> list[str | int | None]:
    """500 streams at once; in every other wave each tenth client goes away after its first word."""
    async with openai.AsyncOpenAI(
        base_url=url + "/v1", api_key="none", max_retries=0, timeout=300
    ) as client:
        return await asyncio.gather(
            *(one(client, i, leavers and i % 10 == 0) for i in range(N_STREAMS))
        )


def resident(pid: int) -> int:
    """Bytes of a process that are in memory and its own: what it shares (files, the ranks'
    segments) is mapped bit by bit."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * PAGE_BYTES


def growth(times: list[float], sizes: list[int]) -> float:
    """Bytes by which the straight line through the sizes rises from the first time to the last."""
    return float(np.polyfit(times, sizes, 1)[0]) * (times[-1] - times[0])


def every_size(client: openai.OpenAI, most: int) -> None:
    """Has the ranks run a step of every size up to `most`, as oneDNN keeps a kernel for each
    (0.7 GB a rank for 512 sizes, which a load would fill bit by bit), and touch all of their KV
    cache."""
    draw = random.Random(1)
    for n_tokens in [*range(2, most), *[500] * 40]:
        prompt = [draw.randrange(1000) for _ in range(n_tokens)]  # none that a prefix cache knows
        client.completions.create(model="demo", prompt=prompt, max_tokens=1)


# A process may grow by `most` bytes in `duration_s`, once it is warm. The short one has short
# steps: they are soon warm.
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "duration_s, step_tokens, most",
    [
        pytest.param(20, 64, 24 << 20, marks=pytest.mark.slow),
        pytest.param(600, 512, 12 << 20, marks=pytest.mark.slow),
    ],
)
def test_500_streams_at_once(duration_s, step_tokens, most):
    with serving(
        "--nproc_per_node",
        "2",
        "--max_queue",
        str(MAX_QUEUE),
        "--max_step_tokens",
        str(step_tokens),
    ) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        alone = [client.completions.create(**wish).choices[0].text for wish in WISHES]
        assert len(set(alone)) > len(WISHES) / 2
        every_size(client, step_tokens)
        pids = [server.process.pid, *server.ranks()]
        times, sizes, n_waves, n_done, n_refused = [], [], 0, 0, 0
        for leavers in (True, False):
            asyncio.run(wave(server.url, leavers))  # every branch once
        began = time.monotonic()
        while time.monotonic() - began < duration_s or n_waves < 4:
            results = asyncio.run(wave(server.url, leavers=n_waves % 2 == 1))
            wrong = {
                i: text
                for i, text in enumerate(results)
                if isinstance(text, str) and text != alone[i % len(WISHES)]
            }
            assert not wrong, (
                f"wave {n_waves}: {len(wrong)} texts differ, e.g. {list(wrong.items())[:2]}"
            )
            n_waves, n_done = n_waves + 1, n_done + sum(isinstance(text, str) for text in results)
            n_refused += results.count(429)
            assert N_STREAMS - results.count(429) >= MAX_QUEUE
            times.append(time.monotonic() - began)
            sizes.append([resident(pid) for pid in pids])
        print(
            f"{n_waves} waves, {n_done} streams finished, {n_refused} got 429, MB of server and "
            "ranks:",
            [[round(size / 1e6, 1) for size in row] for row in sizes[:: max(1, len(sizes) // 10)]],
        )
        assert n_refused and server.ranks() == pids[1:], (
            "the same ranks from the beginning to the end"
        )
        risen = [growth(times, [row[i] for row in sizes]) for i in range(len(pids))]
        print("MB that they grew after warming up:", [round(each / 1e6, 2) for each in risen])
        assert max(risen) < most, risen
        assert not server.failures() and "Traceback" not in server.stderr
        deadline = time.monotonic() + PATIENCE_S
        while 'llama_tp:kv_cache_usage_perc{model_name="demo"} 0.0' not in (
            page := server.get("/metrics")[2].decode()
        ):
            assert time.monotonic() < deadline, page  # no block is left behind
            time.sleep(0.1)
        assert server.end() == 0
