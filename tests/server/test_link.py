"""Frames over a real socket: whole, in order, bounded; a peer that goes or talks nonsense is
noticed."""

import asyncio
import socket
import struct

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.server import link
from llama_tp.server.link import MAX_FRAME_BYTES, BrokenFrame, RankEnd, ServerEnd, decode, encode
from tests.ranks import PATIENCE_S


def together(path, server, rank):
    """Runs `server(ServerEnd)` and, in a thread, `rank(RankEnd)` at the two ends of a link; their
    results."""

    async def main():
        got = asyncio.get_running_loop().create_future()

        async def connected(reader, writer):
            got.set_result(ServerEnd(reader, writer))

        listener = await asyncio.start_unix_server(connected, path)

        def other():
            end = RankEnd(path)
            try:
                return rank(end)
            finally:
                end.close()

        async with listener:
            thread = asyncio.create_task(asyncio.to_thread(other))
            end = await got
            result = await server(end)
            end.close()
            return result, await thread

    return asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_frames_arrive_whole_and_in_order(tmp_path):
    messages = [
        {"n": i, "text": "\ud800é\0" * i, "seed": 2**63 - 1, "p": 0.1 + i} for i in range(300)
    ]
    messages.append({"ids": list(range(300_000))})

    async def server(end):
        for message in messages:
            end.send(message)
        return [await end.take() for _ in messages] + [await end.take()]

    def rank(end):
        got = []
        while len(got) < len(messages):
            got += end.take(wait=True)
        for message in got:
            end.send(message)
        return got

    back, there = together(str(tmp_path / "s"), server, rank)
    assert there == messages and back == [*messages, None]


def test_take_does_not_wait_unless_asked_and_tells_the_end(tmp_path):
    async def server(end):
        await end.take()
        end.send({"a": 1})
        assert await end.take() == {"seen": 1}

    def rank(end):
        assert end.take(wait=False) == []
        end.send({"go": 1})
        assert end.take(wait=True) == [{"a": 1}]
        end.send({"seen": 1})
        assert end.take(wait=True) is None
        end.send({"nobody": "hears"})

    together(str(tmp_path / "s"), server, rank)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 3) + b"{\xff}",
    ],
)
def test_nonsense_ends_the_link_on_both_ends(tmp_path, data):
    async def server(end):
        end._writer.write(data)
        with pytest.raises(BrokenFrame):
            await end.take()

    def rank(end):
        end._sock.sendall(data)
        assert end.take(wait=True) is None

    together(str(tmp_path / "s"), server, rank)


def test_a_frame_cut_short_is_the_end(tmp_path):
    async def server(end):
        assert await end.take() is None

    def rank(end):
        end._sock.sendall(encode({"a": "b" * 100})[:-1])
        end._sock.shutdown(socket.SHUT_WR)

    together(str(tmp_path / "s"), server, rank)


def test_what_is_not_json_is_not_sent():
    with pytest.raises(ValueError):
        encode({"logprob": float("nan")})
    with pytest.raises(BrokenFrame):
        decode(b"[" * 100_000)


def test_nobody_there_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="does not reach the HTTP server"):
        RankEnd(str(tmp_path / "none"))


def test_many_messages_at_once_leave_turns_to_others(tmp_path, monkeypatch):
    """A thousand prompts of two thousand ids are 10 MB: the loop looks after its other clients
    between them. Encoding is what takes its time, so what is encoded between two turns of another
    task is counted; seconds would depend on the machine."""
    prompts = [list(range(2000)) for _ in range(1000)]
    encoded = [0]  # bytes in each turn of `others`

    def counting(message):
        encoded[-1] += len(data := encode(message))
        return data

    monkeypatch.setattr(link, "encode", counting)

    async def server(end):
        over = asyncio.Event()

        async def others():
            while not over.is_set():
                await asyncio.sleep(0)
                encoded.append(0)

        watching = asyncio.create_task(others())
        await asyncio.sleep(0)
        for i, prompt in enumerate(prompts):
            end.send({"id": i, "prompt": prompt})
        assert await end.take() == {"n": 1000}
        over.set()
        await watching

    def rank(end):
        got = []
        while len(got) < 1000:
            got += end.take(wait=True)
        assert [each["id"] for each in got] == list(range(1000)) and all(
            each["prompt"] == prompts[0] for each in got
        )
        end.send({"n": len(got)})

    together(str(tmp_path / "s"), server, rank)
    assert sum(encoded) > 8_000_000 and max(encoded) < 4 * link.TURN_BYTES
