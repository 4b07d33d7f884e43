"""From flags to a running server, and its end: the ranks' supervisor and the HTTP server side by side on one event loop.

SIGTERM or Ctrl-C drains: /health says 503, nothing new is taken, what runs may finish within the drain timeout. A second
signal ends it at once.
"""

import asyncio
import contextlib
import resource
import signal
import socket
import sys
from dataclasses import dataclass, field

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.order import Limits
from llama_tp.server.app import Served, build_app
from llama_tp.server.desk import Desk, Unavailable
from llama_tp.server.gate import reply_of
from llama_tp.server.metrics import Metrics
from llama_tp.server.supervisor import Policy, Supervisor, note
from llama_tp.spec.errors import UserError
from llama_tp.text.token_table import Tokenizer

SWITCH_S = 0.001                # a thread that tokenizes gives way to the event loop after this; Python's 5 ms add up
LAST_BYTES_S = 3                # for replies that are complete to reach their clients, at the end


@dataclass(frozen=True)
class FrontOptions:
    """What a server needs to know.

    Args:
        command: what starts the ranks.
        name: of the model, as clients say it.
        drain_s: for what runs to finish, once asked to end.
        chat: what encodes dialogs, if it is not the Llama 3 chat format (protocol.order.ServedModel).
    """

    command: list[str]
    name: str
    tokenizer: Tokenizer
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    max_queue: int = 1024
    max_body_bytes: int = 8 << 20
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    drain_s: float = 20.0
    seed: int = 1
    with_page: bool = True
    chat: object | None = None


def run(options: FrontOptions) -> None:
    """Serves until a signal ends it. Raises UserError: the port is taken, or the ranks cannot be kept running."""
    sock = listen(options.host, options.port)
    if not options.keys and options.host not in ("127.0.0.1", "::1", "localhost"):
        note(f"anyone who reaches {options.host} may use this server: no --api_key is set")
    sys.setswitchinterval(SWITCH_S)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]    # each client is an open file; 1,024, as often set, are few
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with sock:
        asyncio.run(_run(options, sock))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything heavy. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"the server cannot listen at {host}:{port}", str(error), "choose another --port or --host") from None


class _Protocol(H11Protocol):
    """HTTP/1.1 that tells in OpenAI's shape of what it cannot read, which never comes to the gate."""

    def send_400_response(self, msg: str) -> None:
        status, headers, body = reply_of(RequestError(msg, "", "send HTTP/1.1 with at most 64 KiB of headers",
                                                      code="invalid_http"))
        headers |= {"content-length": str(len(body)), "connection": "close"}
        for event in (h11.Response(status_code=status, headers=list(headers.items()), reason="Bad Request"),
                      h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Http(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self):
        yield


async def _run(options: FrontOptions, sock: socket.socket) -> None:
    desk = Desk(options.max_queue, Metrics(options.name))
    served = Served(options.name, options.tokenizer, desk, options.limits, options.seed, options.chat)
    app = build_app(served, options.keys, options.max_body_bytes, options.with_page)
    # h11 and not whatever is installed: it bounds the headers, which come before any key is looked at
    http = _Http(uvicorn.Config(app, http=_Protocol, log_level="warning", access_log=False, lifespan="off", ws="none",
                                server_header=False, timeout_graceful_shutdown=LAST_BYTES_S))
    supervisor = Supervisor(options.command, desk, options.policy)
    asked = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.put_nowait, number)
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    note(f"listening on http://{host}:{port} (model {options.name!r}); /health is 503 until the model has loaded")
    ranks, serving = asyncio.create_task(supervisor.run()), asyncio.create_task(http.serve(sockets=[sock]))
    ready, ending = asyncio.create_task(_say_ready(desk)), asyncio.create_task(asked.get())
    try:
        await asyncio.wait([ranks, ending, serving], return_when=asyncio.FIRST_COMPLETED)
        if ending.done():
            await _drain(options, desk, asked, ranks)
        else:
            desk.give_up("the ranks have ended")
    finally:
        supervisor.stop()
        http.should_exit = True
        ready.cancel()
        ending.cancel()
        served.close()
        results = await asyncio.gather(ranks, serving, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _say_ready(desk: Desk) -> None:
    while desk.info is None:
        await asyncio.sleep(0.05)
    info = desk.info
    note(f"ready: {info['tp']} rank(s), up to {info['max_rows']} samples at once and {desk.max_queue} waiting, context of "
         f"{info['max_model_len']} tokens (context_window={info['max_model_len']}, is_chat_model=True for LlamaIndex)")


async def _drain(options: FrontOptions, desk: Desk, asked: asyncio.Queue, ranks: asyncio.Task) -> None:
    """Lets what is in flight finish: until the time is up, another signal comes or the ranks are gone for good."""
    desk.draining = True
    note(f"ending: {desk.n_flights} requests have {options.drain_s:g} s to finish; another signal ends them now")
    waits = [asyncio.create_task(desk.wait_until_empty()), asyncio.create_task(asked.get()), ranks]
    await asyncio.wait(waits, timeout=options.drain_s, return_when=asyncio.FIRST_COMPLETED)
    for each in waits[:2]:
        each.cancel()
    if desk.n_flights:
        note(f"{desk.n_flights} requests are cut short")
        desk.cut(Unavailable("the server has been shut down", desk.restart_s))
    sys.stderr.flush()
