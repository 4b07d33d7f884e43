"""Ranks that end in every way: started again, and what was in flight goes on; or one clear error,
and nothing left behind."""

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.engine.request import Request
from llama_tp.sampling.params import SamplingParams
from llama_tp.server.link import encode
from llama_tp.server.metrics import Metrics
from llama_tp.server.request_manager import Failed, RequestManager, Unavailable
from llama_tp.server.supervisor import Policy, Supervisor
from tests.ranks import PATIENCE_S, is_alive

RANK = str(Path(__file__).parents[1] / "scripts" / "fake_rank.py")
SOON = Policy(max_restarts=4, backoff_s=0.01, silence_s=1.5)


@contextlib.asynccontextmanager
async def kept(folder, *plans, policy=SOON):
    """A request manager and the supervisor's task, with fake ranks of these plans; nothing of them
    may be left
    at the end."""
    manager = RequestManager(100, Metrics("m"))
    supervisor = Supervisor([sys.executable, RANK, str(folder), *plans], manager, policy)
    task = asyncio.create_task(supervisor.run())
    try:
        yield manager, supervisor, task
    finally:
        supervisor.stop()
        with contextlib.suppress(UserError):
            await asyncio.wait_for(task, PATIENCE_S)
        left = [int(file.read_text()) for file in folder.iterdir()]
        assert left
        await until(lambda: not any(map(is_alive, left)))  # who is killed takes a moment to go


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def requests(n: int, **params) -> list[Request]:
    return [
        Request(
            f"r{i}",
            [i % 2, 5, 6],
            SamplingParams(**{"seed": i, "max_tokens": 12, "n": 1 + i % 3, **params}),
        )
        for i in range(n)
    ]


async def read(handle) -> list[tuple]:
    """(ids, text, finish reason) of each sample of each request."""
    samples = {
        (inflight.request.id, i): [[], "", None]
        for inflight in handle.inflight
        for i in range(inflight.request.params.n)
    }
    while not handle.is_read:
        for delta in await handle.take():
            sample = samples[delta.request_id, delta.index]
            sample[0] += delta.ids
            sample[1] += delta.text
            assert sample[2] is None
            sample[2] = delta.finish_reason
    return [tuple(sample) for sample in samples.values()]


async def run_all(manager, wanted) -> list:
    await until(lambda: manager.state == "ready")
    handles = [manager.take(wanted[i : i + 2]) for i in range(0, len(wanted), 2)]
    return await asyncio.wait_for(asyncio.gather(*map(read, handles)), PATIENCE_S)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list:
    async def main():
        async with kept(tmp_path_factory.mktemp("calm"), "live") as (manager, _, _):
            return await run_all(manager, requests(20))

    return asyncio.run(main())


@pytest.mark.parametrize(
    "plans",
    [["die:3", "live"], ["die:1", "die:7", "live"], ["stop:5", "live"], ["die:4", "never", "live"]],
)
def test_what_was_in_flight_goes_on_as_if_nothing_had_happened(plans, tmp_path, undisturbed):
    async def main():
        async with kept(tmp_path, *plans) as (manager, supervisor, _):
            states = set()

            async def watch():
                while True:
                    states.add(manager.state)
                    await asyncio.sleep(0.002)

            watcher = asyncio.create_task(watch())
            got = await run_all(manager, requests(20))
            watcher.cancel()
            assert supervisor.n_starts == len(plans)
            assert states == {"loading", "ready", "restarting"} and manager.n_inflight == 0
            return got

    assert asyncio.run(main()) == undisturbed


def test_a_start_that_fails_is_the_ranks_own_error_once(tmp_path, capfd):
    async def main():
        async with kept(tmp_path, "never") as (_, supervisor, task):
            with pytest.raises(UserError) as caught:
                await asyncio.wait_for(task, PATIENCE_S)
            assert supervisor.n_starts == 1
            return str(caught.value)

    assert asyncio.run(main()) == "the weights are damaged - found none - download them again"
    said = capfd.readouterr().err
    assert "loading" in said and "error: " not in said, "the command says it, once"


def test_a_rank_that_dies_at_every_start_ends_in_one_error(tmp_path):
    async def main():
        async with kept(tmp_path, "die:3", "never") as (manager, supervisor, task):
            await until(lambda: manager.state == "ready")
            handle = manager.take(requests(1))
            with pytest.raises(
                UserError,
                match="the ranks ended 5 times within .*the last time: the weights are damaged",
            ):
                await asyncio.wait_for(task, PATIENCE_S)
            assert supervisor.n_starts == 5
            manager.give_up("they are gone")
            with pytest.raises(Unavailable):
                await read(handle)
            with pytest.raises(Unavailable):
                manager.take(requests(1))
            assert manager.state == "dead"

    asyncio.run(main())


def test_a_bug_keeps_its_traceback(tmp_path, capfd):
    async def main():
        async with kept(tmp_path, "bug") as (_, _, task):
            with pytest.raises(UserError, match="left with code 1"):
                await asyncio.wait_for(task, PATIENCE_S)

    asyncio.run(main())
    assert "RuntimeError: a bug of ours" in capfd.readouterr().err


def test_a_request_that_kills_its_ranks_is_given_up_and_the_server_lives(tmp_path):
    """It dies in the first step of every life; the others would wait for ever behind it."""

    async def main():
        async with kept(tmp_path, "die:2", "die:1", "die:1", "live") as (manager, _, _):
            await until(lambda: manager.state == "ready")
            handle = manager.take(requests(1))
            with pytest.raises(Failed, match="ended 3 times while this request was running"):
                await read(handle)
            assert (await run_all(manager, requests(1)))[0][0][2] == "stop"

    asyncio.run(main())


def test_stopping_while_the_ranks_load_or_idle(tmp_path):
    async def main(*plans):
        folder = tmp_path / plans[0]
        folder.mkdir()
        async with kept(folder, *plans) as (manager, _, _):
            await until(
                lambda: (
                    list(folder.glob("child")) if plans == ("deaf",) else manager.state == "ready"
                )
            )

    asyncio.run(main("live"))
    asyncio.run(main("deaf"))


def test_a_silence_without_work_is_no_hang(tmp_path):
    async def main():
        async with kept(tmp_path, "slow", policy=Policy(silence_s=0.6)) as (manager, supervisor, _):
            await until(lambda: manager.state == "ready")
            await asyncio.sleep(1)
            assert len(await run_all(manager, requests(1, max_tokens=70))) == 1  # 1.4 s of steps
            assert supervisor.n_starts == 1

    asyncio.run(main())


def test_clients_that_come_and_go_do_not_hide_a_hang(tmp_path):
    """Ranks that stop in their first step; each client waits for a third of the silence that
    counts, and goes."""

    async def main():
        async with kept(
            tmp_path, "stop:1", "live", policy=Policy(backoff_s=0.01, silence_s=0.9)
        ) as (manager, supervisor, _):
            await until(lambda: manager.state == "ready")
            for i in range(30):
                if supervisor.n_starts == 2:
                    break
                if manager.state == "ready":
                    handle = manager.take([Request(f"r{i}", [1, 2], SamplingParams(seed=1))])
                    await asyncio.sleep(0.3)
                    manager.drop(handle)
            assert supervisor.n_starts == 2

    asyncio.run(main())


def test_a_long_load_while_requests_wait_is_no_hang(tmp_path):
    async def main():
        async with kept(
            tmp_path, "die:3", "load:1.5", policy=Policy(backoff_s=0.01, silence_s=0.6)
        ) as (manager, supervisor, _):
            assert len(await run_all(manager, requests(1))) == 1
            assert supervisor.n_starts == 2

    asyncio.run(main())


def test_ranks_that_do_not_come_are_ended(tmp_path):
    """Stopped before they connect, say: nobody else is there who could notice."""

    async def main():
        async with kept(tmp_path, "deaf", policy=Policy(load_s=0.8)) as (_, supervisor, task):
            with pytest.raises(
                UserError, match="the ranks have not been ready within 0.8 s of their start"
            ):
                await asyncio.wait_for(task, 20)
            assert supervisor.n_starts == 1

    asyncio.run(main())


def test_what_ranks_that_were_hung_up_on_still_say_is_not_heard():
    class Writer:
        close = staticmethod(lambda: None)

    async def main():
        manager = RequestManager(100, Metrics("m"))
        supervisor, reader = Supervisor([], manager), asyncio.StreamReader()
        conversation = asyncio.create_task(supervisor._on_connect(reader, Writer()))
        await asyncio.sleep(0)
        supervisor._hang_up()
        reader.feed_data(encode({"is": "ready", "max_rows": 8}))
        reader.feed_eof()
        await conversation
        assert manager.state == "loading" and manager.info is None

    asyncio.run(main())


def test_an_abort_reaches_the_ranks(tmp_path):
    async def main():
        async with kept(tmp_path, "live") as (manager, _, _):
            await until(lambda: manager.state == "ready")
            handle = manager.take([Request("a", [1, 2], SamplingParams(seed=1, n=3))])
            while handle.inflight[0].n_output < 6:
                await handle.take()
            assert manager.stats["n_running"] == 3
            manager.drop(handle)
            await until(lambda: manager.stats["n_running"] == 0)
            assert manager.n_inflight == 0
            assert (
                b'request_success_total{finished_reason="abort",model_name="m"} 3.0'
                in manager.metrics.text(manager)
            )

    asyncio.run(main())
