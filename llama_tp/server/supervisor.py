"""Starts the ranks, watches them, starts them again when they end, and leaves nothing of them
behind.

The ranks are one `llama_tp.launch`, whose rank 0 connects to our socket. That it ends is the sign
that something was wrong: the engine's own watch ends the job when a rank dies or hangs. Only when
all of it is silent in the middle of work, or does not come to an end with loading (every process
stopped, or a single rank that hangs), does this module end it.

A start that never gets ready is not repeated before the ranks have been ready once: the same flags
would fail again. Knows no HTTP; what the messages say is the request manager's business.
"""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llama_tp.arch.errors import UserError
from llama_tp.parallel.private_folder import PrivateFolder, sweep
from llama_tp.server.link import BrokenFrame, ServerEnd
from llama_tp.server.request_manager import RequestManager

# the socket's path, in the environment of the ranks: marks all that we have started
LINK = "LLAMA_TP_LINK"
RANKS_ERROR = re.compile(r"(?:\[rank \d+\] )?error: (.*)")  # as cli and health print it
LOOK_S = 0.05  # how often the launcher is looked at
ENDING_S = 5.0  # from the first sign of an end until what is left is killed
STOPPING_S = 15.0  # the same where we ask them to end
LONGEST_PATH = 100  # of a unix socket: the kernel's limit is 108


@dataclass(frozen=True)
class Policy:
    """When to start the ranks again: at most `max_restarts` times in `window_s`, `backoff_s` after
    the first end and twice as long after each other; and when to end them: after `silence_s`
    without a word in the middle of work, or when they are not ready `load_s` after their start."""

    max_restarts: int = 5
    window_s: float = 600.0
    backoff_s: float = 1.0
    longest_backoff_s: float = 30.0
    silence_s: float = 330.0
    load_s: float = 3630.0


class Supervisor:
    """The ranks' keeper.

    Args:
        command: what starts them.
        request manager: told of ranks that come and go, and of what they say.
        policy: when to start them again.
        env: of the ranks, besides this process's.
    """

    def __init__(
        self,
        command: list[str],
        manager: RequestManager,
        policy: Policy = Policy(),
        env: dict[str, str] | None = None,
    ):
        self.command, self.manager, self.policy = command, manager, policy
        self.n_starts = 0
        self.ended_at: list[float] = []  # of the ends that count against max_restarts
        self._env = env or {}
        self._link: ServerEnd | None = None
        # rank 0 has been there since the last start, and was ready
        self._connected = self._loaded = False
        self._left_at: float | None = None  # and has gone again
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keeps ranks running until `stop`. Raises UserError when it gives up; in any case nothing
        of them is left."""
        folder = PrivateFolder()
        self._path = os.path.join(folder.path, "link")
        try:
            if len(self._path) > LONGEST_PATH:
                raise UserError(
                    "the folder for temporary files has too long a name",
                    folder.path,
                    "set TMPDIR to a shorter one",
                )
            listener = await asyncio.start_unix_server(self._on_connect, self._path)
            async with listener:
                while not self._stopping.is_set():
                    await self._one_life()
        finally:
            end_all(f"{LINK}={self._path}")
            folder.remove()
            sweep()  # a launcher that had to be killed has left its own

    def stop(self) -> None:
        """Lets `run` end the ranks, in good order where they have got so far, and return."""
        self._stopping.set()

    async def _one_life(self) -> None:
        """Starts the ranks, stays until they have ended, and waits before the next start or raises
        UserError."""
        started, self._connected, self._loaded, self._left_at = time.monotonic(), False, False, None
        self.n_starts += 1
        ranks = Process(self.command, {**self._env, LINK: self._path})
        try:
            await self._until_end(ranks, load_by=started + self.policy.load_s)
        finally:
            self._hang_up()
            self.manager.detach()
            await asyncio.to_thread(ranks.end, f"{LINK}={self._path}")
        if self._stopping.is_set():
            return
        reason = ranks.reason()
        if self.manager.info is None:
            raise UserError(reason)
        now = time.monotonic()
        self.ended_at = [at for at in self.ended_at if now - at < self.policy.window_s] + [now]
        if len(self.ended_at) > self.policy.max_restarts:
            raise UserError(
                f"the ranks ended {len(self.ended_at)} times within {now - self.ended_at[0]:.0f} s",
                f"the last time: {reason}",
                "correct that and start the server again; --max_restarts sets how often is too "
                "often",
            )
        wait_s = min(
            self.policy.backoff_s * 2 ** (len(self.ended_at) - 1), self.policy.longest_backoff_s
        )
        note(
            f"the ranks have ended after {now - started:.0f} s: {reason}; starting them again in "
            f"{wait_s:g} s "
            f"({len(self.ended_at)} of {self.policy.max_restarts}), {self.manager.n_inflight} "
            "requests "
            "go on then"
        )
        self.manager.metrics.restarts.inc()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), wait_s)

    async def _until_end(self, ranks: "Process", load_by: float) -> None:
        """Returns when the launcher has ended, or has to be killed."""
        while ranks.is_alive():
            now = time.monotonic()
            if self._stopping.is_set():
                self._hang_up()  # rank 0 then ends the job by itself
                ranks.ask_to_end(STOPPING_S, signalled=not self._connected)
            elif self._left_at is not None:
                ranks.ask_to_end(ENDING_S)  # it says why, and torchrun ends the others
            elif self.manager.silent_s > self.policy.silence_s:
                ranks.errors.append(
                    f"the ranks have work, and have not been heard for {self.policy.silence_s:g} s"
                )
                return
            elif now > load_by and not self._loaded:
                ranks.errors.append(
                    f"the ranks have not been ready within {self.policy.load_s:g} s of their start"
                )
                return
            if now > ranks.end_by:
                return
            await asyncio.sleep(LOOK_S)

    def _hang_up(self) -> None:
        if self._link:
            self._link.close()
        self._link = None

    async def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The whole conversation with one rank 0."""
        link = ServerEnd(reader, writer)
        if self._connected:  # one a start
            link.close()
            return
        self._link, self._connected = link, True
        try:
            # unless hung up on meanwhile
            while (message := await link.take()) is not None and self._link is link:
                if message["is"] == "ready":
                    self._loaded = True
                    self.manager.attach(
                        link, {key: value for key, value in message.items() if key != "is"}
                    )
                else:
                    self.manager.hear(message)
        except BrokenFrame as error:
            note(f"rank 0 sent what cannot be read: {error}")
        finally:
            if self._link is link:
                self._link, self._left_at = None, time.monotonic()
                self.manager.detach()
            link.close()


class Process:
    """The launcher of the ranks, in a session of its own, so that a Ctrl-C meant for us does not
    reach it. Its stderr is passed on as it comes, but for the errors that tell why it ends, which
    are kept: `reason` puts that into one line."""

    def __init__(self, command: list[str], env: dict[str, str]):
        defaults = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,
            stderr=subprocess.PIPE,
            env={**defaults, **os.environ, **env},
            start_new_session=True,
        )
        self.errors: list[str] = []  # what ranks have said of the end
        self.end_by = float("inf")
        self._pump = threading.Thread(
            target=self._pass_on, args=(self._process.stderr,), daemon=True
        )
        self._pump.start()

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask_to_end(self, within_s: float, signalled: bool = False) -> None:
        """Sets the time by which it will be killed; if `signalled`, has the launcher end the ranks
        now. Later calls do nothing."""
        if self.end_by == float("inf"):
            self.end_by = time.monotonic() + within_s
            if signalled:
                self._process.terminate()

    def end(self, mark: str) -> None:
        """Kills what is left of the job, and collects the launcher."""
        if self.is_alive():
            self._process.kill()
        end_all(mark)
        self._process.wait()
        self._pump.join(2)

    def reason(self) -> str:
        """Why it ended: the first error that was printed, or its code."""
        return (
            self.errors[0]
            if self.errors
            else f"the launcher left with code {self._process.returncode}"
        )

    def _pass_on(self, stderr: IO[bytes]) -> None:
        """The thread that reads its stderr."""
        for raw in stderr:
            line = raw.decode(errors="replace").rstrip("\n")
            told = RANKS_ERROR.match(line)
            if told and len(self.errors) < 10:
                self.errors.append(told[1])
            else:
                show([line])


def end_all(mark: str) -> None:
    """Kills every process that has "NAME=value" in its environment: ranks have sessions of their
    own, and may be stopped or orphaned. Does nothing where there is no /proc; the ranks' own watch
    then ends them."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def note(text: str) -> None:
    """A line for people."""
    show([f"server: {text}"])


def show(lines: list[str]) -> None:
    """Lines to stderr; one that nobody reads any more is no failure of ours."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write("".join(line + "\n" for line in lines))
        sys.stderr.flush()
