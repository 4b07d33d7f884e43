"""Gaps between tokens of eight streams, one of them with a form, undisturbed and beside a hundred
hostile forms, on the demo."""

import itertools
import json
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request

from tests.servers import serving

# all get past the check of their size, but for the first; see tests/text/test_grammar_pool.py
HOSTILE = [
    lambda i: {"regex": f"(a?){{{30000 + i}}}a{{30000}}"},
    lambda i: {"regex": f"(a?){{1500}}a{{{1500 + i}}}"},
    lambda i: {"regex": ".*" * (1000 + i)},
    lambda i: {
        "structured_outputs": {
            "json": {
                "type": "string",
                "allOf": [{"pattern": f"b{{{i}}}a{{{k}}}"} for k in range(1, 250)],
            }
        }
    },
    lambda i: {"grammar": f'start: "a" x{{{40000 + i}}}\nx: "b"'},
    lambda i: {"grammar": f'start: s{i}\ns{i}: s{i} s{i} | s{i} s{i} s{i} | "a" | ""'},
]


def send(url: str, body: dict):
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120)


def gaps_of(url: str, number: int, out: list[float]) -> None:
    form = {"regex": r"([A-Za-z',;.:!?]{1,14}[ \n]){300,}"} if number == 0 else {}
    body = {"prompt": f"ROMEO {number}:", "max_tokens": 200, "stream": True, "seed": 1, **form}
    last = 0.0
    with send(url, body) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                now = time.monotonic()
                if last:
                    out.append(now - last)
                last = now


def round_of(url: str) -> tuple[float, float]:
    """The 99th percentile of the gaps of eight streams, and the longest, in ms."""
    gaps: list[float] = []
    threads = [threading.Thread(target=gaps_of, args=(url, i, gaps)) for i in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return 1000 * statistics.quantiles(gaps, n=100)[98], 1000 * max(gaps)


def storm(url: str, numbers, over: threading.Event, statuses: list[int]) -> None:
    while not over.is_set():
        i = next(numbers)
        try:
            with send(
                url,
                {"prompt": "x", "max_tokens": 20}
                | HOSTILE[i % len(HOSTILE)](i // len(HOSTILE) % 100),
            ) as reply:
                reply.read()
                statuses.append(reply.status)
        except urllib.error.HTTPError as error:
            statuses.append(error.code)
        except OSError:
            statuses.append(0)


with serving("--nproc_per_node", sys.argv[1] if len(sys.argv) > 1 else "1", "--quiet") as server:
    round_of(server.url)
    for _ in range(3):
        alone = round_of(server.url)
        over, statuses, numbers = threading.Event(), [], itertools.count()
        threads = [
            threading.Thread(target=storm, args=(server.url, numbers, over, statuses))
            for _ in range(100)
        ]
        for each in threads:
            each.start()
        time.sleep(1)
        beside = round_of(server.url)
        over.set()
        for each in threads:
            each.join()
        told = {status: statuses.count(status) for status in sorted(set(statuses))}
        print(
            f"p99 gap alone {alone[0]:.0f} ms, beside {beside[0]:.0f}; longest {alone[1]:.0f} and "
            f"{beside[1]:.0f}; {told}",
            flush=True,
        )
    assert "starting them again" not in server.stderr, server.stderr
