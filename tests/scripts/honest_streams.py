"""Reads streams of a server, one after the other on each of N connections, until its stdin ends:
python honest_streams.py URL N

Prints one line of JSON: the longest pause in each stream after its first token, how many tokens
there were, and how many times a stream was refused (it asks again). A process of its own, so that
nothing but the server delays it.
"""

import asyncio
import json
import sys
import time

BODY = json.dumps({"prompt": "ROMEO:", "max_tokens": 450, "stream": True, "ignore_eos": True})
ASKED = (
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
)
host, _, port = sys.argv[1].removeprefix("http://").partition(":")
pauses, firsts, n_tokens, n_refused, n_broken = [], [], 0, 0, 0


async def one_stream() -> None:
    global n_tokens, n_refused, n_broken
    reader, writer = await asyncio.open_connection(host, int(port))
    last, longest, begun = 0.0, 0.0, time.monotonic()
    try:
        writer.write(ASKED.encode())
        if b" 200 " not in await reader.readline():
            n_refused += 1
            await asyncio.sleep(0.5)
            return
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                now = time.monotonic()
                if b'"error"' in line:
                    n_broken += 1
                if not last:
                    firsts.append(now - begun)
                longest = max(longest, now - last) if last else 0.0
                last = now
                n_tokens += 1
        n_broken += 1  # it ended without its end
    finally:
        if last:
            pauses.append(max(longest, time.monotonic() - last))
        writer.close()


async def always() -> None:
    while True:
        await one_stream()


async def main() -> None:
    streams = [asyncio.create_task(always()) for _ in range(int(sys.argv[2]))]
    await asyncio.to_thread(sys.stdin.read)
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)
    for stream in streams:
        if not stream.cancelled():
            raise stream.exception()
    print(
        json.dumps(
            {
                "pauses": pauses,
                "firsts": firsts,
                "n_tokens": n_tokens,
                "n_refused": n_refused,
                "n_broken": n_broken,
            }
        )
    )


asyncio.run(main())
