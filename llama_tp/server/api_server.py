"""From flags to a running server, and its end: the ranks' supervisor and the HTTP server side by
side on one event loop.

SIGTERM, SIGHUP or Ctrl-C drains: /health says 503, nothing new is taken, what runs may finish
within the drain timeout. A second signal ends it at once.
"""

import asyncio
import contextlib
import ctypes
import functools
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import uvicorn

from llama_tp.arch.errors import UserError
from llama_tp.protocol.defaults import SamplingDefaults
from llama_tp.protocol.order import Limits
from llama_tp.server.app import Served, build_app
from llama_tp.server.connections import (
    Connection,
    ConnectionLimits,
    Connections,
    LogLimit,
    backlog_of,
    most_connections,
)
from llama_tp.server.metrics import Metrics
from llama_tp.server.request_manager import RequestManager, Unavailable
from llama_tp.server.supervisor import Policy, Supervisor, note
from llama_tp.text.chat_format import DialogEncoder
from llama_tp.text.token_table import Tokenizer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# a thread that reads or tokenizes gives way to the loop after this, at each of its system calls
SWITCH_S = 0.0001
# (twice as many, on Linux) that the kernel keeps for a client who does not read: it would keep 4 MB
SEND_BYTES = 1 << 17
STALE = 0.2  # of the silence that ends the ranks: from then on /health says 503
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LAST_BYTES_S = 3  # for replies that are complete to reach their clients, at the end


@dataclass(frozen=True)
class ServerOptions:
    """What a server needs to know.

    Args:
        command: what starts the ranks.
        name: of the model, as clients say it; aliases, strict_name: as ServedModel's.
        metrics_prefix: as Metrics' prefix.
        allow_origins: of web pages that may ask.
        drain_s: for what runs to finish, once asked to end.
        defaults: what requests mean that do not say it.
        chat: what encodes dialogs, if it is not the Llama 3 chat format
            (protocol.order.ServedModel).
    """

    command: list[str]
    name: str
    tokenizer: Tokenizer
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    max_queue: int = 1024
    max_queue_logprobs: int = 1 << 24
    max_body_bytes: int = 8 << 20
    limits: Limits = field(default_factory=Limits)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    policy: Policy = field(default_factory=Policy)
    drain_s: float = 20.0
    seed: int = 1
    with_page: bool = True
    chat: DialogEncoder | None = None
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    aliases: tuple[str, ...] = ()
    strict_name: bool = False
    metrics_prefix: str = "llama_tp"
    allow_origins: tuple[str, ...] = ()


def run(options: ServerOptions) -> None:
    """Serves until a signal ends it. Raises UserError: the port is taken, or the ranks cannot be
    kept running."""
    # each client is an open file; 1,024, as often set, are few
    n_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    n_files = n_files if n_files != resource.RLIM_INFINITY else 1 << 20
    most, backlog = (
        most_connections(options.connections.max_connections, n_files),
        backlog_of(n_files),
    )
    sock = listen(options.host, options.port, backlog)
    if not options.keys and options.host not in ("127.0.0.1", "::1", "localhost"):
        note(f"anyone who reaches {options.host} may use this server: no --api_key is set")
    if not options.keys and "*" in options.allow_origins:
        note(
            "any web page that a browser on this machine opens may use this server: "
            "--allow_origins is *, and no --api_key is set"
        )
    sys.setswitchinterval(SWITCH_S)
    give_memory_back()
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (n_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    with sock:
        asyncio.run(_run(options, sock, Connections(options.connections, most), backlog))


def give_memory_back() -> None:
    """Has large blocks go back to the system when they are freed: those above 128 KiB, where glibc
    begins. It raises that with every one that is freed, up to 32 MiB, and keeps what is smaller:
    200 bodies of 8 MB left 800 MB behind."""
    with contextlib.suppress(OSError, AttributeError):  # another allocator
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A listening socket, taken before anything heavy. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family, backlog=backlog)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # of each connection
        return sock
    except (OSError, OverflowError) as error:
        raise UserError(
            f"the server cannot listen at {host}:{port}",
            str(error),
            "choose another --port or --host",
        ) from None


class _Http(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(
    options: ServerOptions, sock: socket.socket, connections: Connections, backlog: int
) -> None:
    manager = RequestManager(
        options.max_queue,
        Metrics(options.name, options.metrics_prefix),
        stale_s=STALE * options.policy.silence_s,
        max_scores=options.max_queue_logprobs,
    )
    served = Served(
        options.name,
        options.tokenizer,
        manager,
        options.limits,
        options.seed,
        options.chat,
        options.aliases,
        options.strict_name,
        options.defaults,
    )
    app = build_app(
        served, options.keys, options.max_body_bytes, options.with_page, options.allow_origins
    )
    # h11 and not whatever is installed: it bounds the headers, which come before any key is looked
    # at
    http = _Http(
        uvicorn.Config(
            app,
            http=functools.partial(Connection, connections),  # type: ignore[arg-type]  # called as a class is
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=LAST_BYTES_S,
            timeout_keep_alive=options.connections.keep_alive_s,  # type: ignore[arg-type]  # any number does
            backlog=backlog,
        )
    )
    for name in ("asyncio", "uvicorn.error", "llama_tp.server"):
        logging.getLogger(name).addFilter(LogLimit())
    supervisor = Supervisor(options.command, manager, options.policy)
    asked: asyncio.Queue[int] = asyncio.Queue()
    # nohup's
    for number in [
        each
        for each in SIGNALS
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN
    ]:
        asyncio.get_running_loop().add_signal_handler(number, asked.put_nowait, number)
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    names = " and ".join(map(repr, (options.name, *options.aliases)))
    note(
        f"listening on http://{host}:{port} (model {names}); /health is 503 until the model has "
        "loaded"
    )
    note(f"what requests do not say: {options.defaults}")
    ranks, serving = (
        asyncio.create_task(supervisor.run()),
        asyncio.create_task(http.serve(sockets=[sock])),
    )
    watching = asyncio.create_task(connections.watch(http.server_state.connections))
    ready, ending = asyncio.create_task(_say_ready(manager)), asyncio.create_task(asked.get())
    try:
        await asyncio.wait([ranks, ending, serving, watching], return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            await _drain(options, manager, asked, ranks)
        else:
            manager.give_up("the ranks have ended")
    finally:
        supervisor.stop()
        http.should_exit = True
        ready.cancel()
        ending.cancel()
        served.close()
        results = await asyncio.gather(ranks, serving, return_exceptions=True)
        watching.cancel()
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _say_ready(manager: RequestManager) -> None:
    while manager.info is None:
        await asyncio.sleep(0.05)
    info = manager.info
    note(
        f"ready: {info['tp']} rank(s), up to {info['max_rows']} samples at once and "
        f"{manager.max_queue} waiting, context of "
        f"{info['max_model_len']} tokens"
    )


async def _drain(
    options: ServerOptions,
    manager: RequestManager,
    asked: asyncio.Queue[int],
    ranks: asyncio.Task[None],
) -> None:
    """Lets what is in flight finish: until the time is up, another signal comes or the ranks are
    gone for good."""
    manager.draining = True
    note(
        f"ending: {manager.n_inflight} requests have {options.drain_s:g} s to finish; another "
        "signal "
        "ends them now"
    )
    waits = [
        asyncio.create_task(manager.wait_until_empty()),
        asyncio.create_task(asked.get()),
        ranks,
    ]
    await asyncio.wait(waits, timeout=options.drain_s, return_when=asyncio.FIRST_COMPLETED)
    for each in waits[:2]:
        each.cancel()
    if manager.n_inflight:
        note(f"{manager.n_inflight} requests are cut short")
        manager.cut(Unavailable("the server has been shut down", manager.restart_s))
    sys.stderr.flush()
