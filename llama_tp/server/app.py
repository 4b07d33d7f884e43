"""The routes: OpenAI's, and those of vLLM's that clients look for. Each reads, asks the room that
knows, and answers.

Bodies are read here and not by FastAPI: its errors are 422, in a shape that OpenAI's clients do not
know. What reads or tokenizes a large body does so in a thread, so that /health keeps answering.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from llama_tp.arch.errors import UserError
from llama_tp.protocol.defaults import KEYS, SamplingDefaults
from llama_tp.protocol.errors import RequestError
from llama_tp.protocol.fields import ChatBody, CompletionBody, check_body
from llama_tp.protocol.forms import check_form, too_many_forms
from llama_tp.protocol.order import Limits, Order, ServedModel, no_model, prepare
from llama_tp.protocol.reading import read_json
from llama_tp.server.answer import answer, json_reply, long_reply
from llama_tp.server.metrics import content_type
from llama_tp.server.middleware import GuardMiddleware, bug, carried, reply_of
from llama_tp.server.page import headers, page
from llama_tp.server.request_manager import WHY_NOT, RequestManager
from llama_tp.server.tokens import SHAPES, detokenize, tokenize, tokenizer_info
from llama_tp.text.chat_format import DialogEncoder
from llama_tp.text.grammar import Form
from llama_tp.text.grammar_pool import N_QUICK, N_SLOW, Busy, GrammarPool
from llama_tp.text.token_table import Tokenizer

# forms that are tried, or wait for it: the last of them waits for two seconds if the others are
# hostile
MAX_TRIALS = 64
T = TypeVar("T")
# a body up to this is read and tokenized on the event loop: a thread would take longer
SMALL_BYTES = 8192


@dataclass
class Served:
    """What the routes share.

    Args:
        seed: requests that bring none get (seed << 32) + their number, so that a run again draws
            the same.
        clock, new_id: what a reply's `created` is, and its id after the prefix.
    """

    name: str
    tokenizer: Tokenizer
    manager: RequestManager
    limits: Limits = field(default_factory=Limits)
    seed: int = 1
    chat: DialogEncoder | None = None  # what encodes dialogs, as ServedModel's
    aliases: tuple[str, ...] = ()  # as ServedModel's, and the next
    strict_name: bool = False
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    started: int = field(default_factory=lambda: int(time.time()))
    n_prompts: int = 0
    clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    # one: it and the event loop take turns at the interpreter's lock, and a second would not make
    # it more
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, "llama_tp texts")
    )
    # these wait for other processes, and take no turns
    form_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(N_QUICK + N_SLOW, "llama_tp forms")
    )
    n_trials: int = 0

    async def call(self, n_bytes: int, work: Callable[[], T]) -> T:
        """`work()`, in a thread if it is about so many bytes that the event loop should not wait
        for it, or may run a template."""
        return (
            work() if n_bytes <= SMALL_BYTES and self.chat is None else await self.in_thread(work)
        )

    async def in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, carried(work))

    @functools.cached_property
    def forms(self) -> GrammarPool:
        """Made with the first form: its process reads the whole vocabulary. Raises UserError where
        forms cannot be followed."""
        return GrammarPool(self.tokenizer, nice=5)

    async def try_form(self, param: str, form: Form) -> None:
        """Raises RequestError for a form that cannot be followed; 429 when too many wait for this
        to be found out."""
        pool = self.forms
        if pool.knows(form):
            return
        if self.n_trials >= MAX_TRIALS:
            raise too_many_forms(
                param,
                Busy(
                    "too many forms of answers wait to be checked",
                    f"the most is {MAX_TRIALS}",
                    "ask again a little later",
                ),
            )
        self.n_trials += 1
        try:
            await asyncio.get_running_loop().run_in_executor(
                self.form_threads, carried(lambda: check_form(param, form, pool))
            )
        finally:
            self.n_trials -= 1

    def close(self) -> None:
        """Ends the processes that try forms."""
        if "forms" in vars(self):
            self.forms.close()

    def model(self) -> ServedModel:
        """Raises Unavailable unless the ranks are ready."""
        info = self.manager.ready()
        return ServedModel(
            self.name,
            self.tokenizer,
            info["max_model_len"],
            info["n_vocab"],
            self.limits,
            self.chat,
            self.aliases,
            self.strict_name,
        )

    def next_seed(self) -> int:
        self.n_prompts += self.limits.max_prompts  # one request's prompts take seed, seed + 1, ...
        return (self.seed << 32) + self.n_prompts

    def fingerprint(self) -> str:
        """Of a reply. Raises Unavailable unless the ranks are ready."""
        info = self.manager.ready()
        mode = "deterministic" if info["deterministic"] else "fast"
        return f"llama_tp-{version()}-tp{info['tp']}-{info['device']}-{info['dtype']}-{mode}"


def version() -> str:
    try:
        return metadata.version("llama_tp")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def build_app(
    served: Served,
    keys: tuple[str, ...] = (),
    max_body_bytes: int = 8 << 20,
    with_page: bool = True,
    allow_origins: tuple[str, ...] = (),
) -> ASGIApp:
    """The whole application behind its middleware, and in front of it, where pages of other origins
    may
    ask, what tells browsers so."""
    # FastAPI's documentation pages load scripts from elsewhere; /openapi.json is all that tools
    # need
    app = FastAPI(
        title="llama_tp", version=version(), docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.exception_handler(UserError)(_on_user_error)
    app.exception_handler(HTTPException)(_on_http_error)
    # gone while it still sent
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=499))
    app.add_exception_handler(Exception, _on_bug)
    _add_completions(app, served)
    _add_models(app, served)
    _add_tokens(app, served)
    _add_watching(app, served)
    if with_page:
        app.get("/", include_in_schema=False)(
            lambda: Response(page(), media_type="text/html", headers=headers())
        )
    middleware = GuardMiddleware(app, served.manager.metrics, keys, max_body_bytes)
    if not allow_origins:
        return middleware
    # a browser asks first without the key that the request will have; keys are headers, so there
    # are no credentials to allow
    return CORSMiddleware(
        middleware,
        allow_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )


def _add_completions(app: FastAPI, served: Served) -> None:
    async def complete(kind: str, prefix: str, request: Request) -> Response:
        model = served.model()
        data, seed = await body_of(request), served.next_seed()
        order_id = f"{prefix}-{served.new_id()}"

        def order() -> Order:
            return prepare(
                check_body(kind, served.defaults.fill(read_json(data), kind)), model, order_id, seed
            )

        made = await served.call(len(data), order)
        form = made.requests[0].params.form
        if form is not None:
            await served.try_form(made.form_field, form)
        return await answer(
            made, model, served.manager, request, int(served.clock()), served.fingerprint()
        )

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        return await complete("chat", "chatcmpl", request)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues texts or token ids."""
        return await complete("completion", "cmpl", request)


def _add_models(app: FastAPI, served: Served) -> None:
    neutral = {name: ChatBody.model_fields[name].default for name in KEYS.values()}

    def cards() -> dict[str, dict[str, Any]]:
        model, means = served.model(), neutral | served.defaults.of("chat")
        return {
            name: {
                "id": name,
                "object": "model",
                "created": served.started,
                "owned_by": "llama_tp",
                "root": model.name,
                "parent": None,
                "max_model_len": model.max_seq_len,
                "default_sampling_params": means,
            }
            for name in model.names
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The one model that is served, under each of its names."""
        return json_reply({"object": "list", "data": list(cards().values())})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """The same, by one of its names."""
        if name not in (known := cards()):
            raise no_model(name, tuple(known))
        return json_reply(known[name])


def _add_tokens(app: FastAPI, served: Served) -> None:
    async def converted(
        work: Callable[[dict[str, Any], ServedModel], dict[str, Any]], request: Request
    ) -> Response:
        model, data = served.model(), await body_of(request)
        return await served.call(len(data), lambda: long_reply(work(read_json(data), model)))

    @app.post("/tokenize", openapi_extra=_body(SHAPES["tokenize"]))
    async def to_tokens(request: Request) -> Response:
        """{"prompt"} or {"messages"} -> {"count", "max_model_len", "tokens", "token_strs"}."""
        return await converted(tokenize, request)

    @app.post("/detokenize", openapi_extra=_body(SHAPES["detokenize"]))
    async def from_tokens(request: Request) -> Response:
        """{"tokens"} -> {"prompt"}."""
        return await converted(detokenize, request)

    @app.get("/tokenizer_info")
    async def info() -> Response:
        """What of the tokenizer clients configure themselves with."""
        return json_reply(tokenizer_info(served.tokenizer))


def _add_watching(app: FastAPI, served: Served) -> None:
    manager = served.manager

    @app.get("/livez")
    async def livez() -> Response:
        """200 as long as this process does its work, also without ranks, which it starts again
        itself: to end it then would lose the requests that wait."""
        if manager.dead:
            raise RequestError(WHY_NOT["dead"], "", "", code="dead", status=503)
        return json_reply({"status": "ok"})

    @app.get("/health")
    async def health() -> Response:
        """200 when requests are taken, else 503."""
        if manager.state == "ready":
            return json_reply({"status": "ok"})
        error = RequestError(WHY_NOT[manager.state], "", "", code=manager.state, status=503)
        error.retry_s = None if manager.dead else manager.restart_s
        raise error

    app.head("/health", include_in_schema=False)(health)  # what some load balancers ask with
    # Kubernetes' name for it
    app.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)(health)
    # vLLM's, for SageMaker
    app.api_route("/ping", methods=["GET", "HEAD", "POST"], include_in_schema=False)(health)
    app.head("/livez", include_in_schema=False)(livez)

    @app.get("/load")
    async def load() -> Response:
        """How busy it is."""
        stats = manager.stats
        return json_reply(
            {
                "server_load": manager.n_samples,
                "state": manager.state,
                "running": stats.get("n_running", 0),
                "waiting": stats.get("n_waiting", 0),
                "kv_use": stats.get("kv_use", 0.0),
            }
        )

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus; in OpenMetrics where the Accept header asks for it."""
        accept = request.headers.get("accept", "")
        return Response(
            manager.metrics.text(manager, accept),
            headers={"content-type": content_type(accept), "vary": "accept"},
        )

    @app.get("/version")
    async def own_version() -> Response:
        """Of llama_tp."""
        return json_reply({"version": version()})


async def body_of(request: Request) -> bytes:
    """The body. Raises RequestError unless it says to be JSON: what says so, a foreign web page may
    not send unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "the content type must be application/json",
            f"found {kind[:80]!r}",
            "send the header Content-Type: application/json",
            code="unsupported_media_type",
            status=415,
        )
    data = bytearray()  # in one place: thousands of pieces would leave the heap in pieces, too
    async for piece in request.stream():
        data += piece
    return bytes(data)


def _documented(shape: type[BaseModel]) -> dict[str, Any]:
    schema = shape.model_json_schema()
    parts = schema.pop("$defs", {})
    for value in schema["properties"].values():  # the reference would point to the document's root
        if reference := value.pop("$ref", None):
            value.update(parts[reference.rpartition("/")[2]])
    return _body(schema)


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _on_user_error(request: Request, error: UserError) -> Response:
    status, headers, body = reply_of(error)
    return Response(body, status, headers)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own: no such route, no such method."""
    what = {404: "no such route", 405: "this route has no such method"}.get(
        error.status_code, "the request cannot be read"
    )
    fix = "GET /openapi.json lists the routes"
    told = RequestError(
        what,
        f"found {request.method} {request.url.path[:80]}",
        fix,
        code="not_found" if error.status_code == 404 else "invalid_request",
        status=error.status_code,
    )
    status, headers, body = reply_of(told)
    return Response(body, status, {**(error.headers or {}), **headers})


async def _on_bug(request: Request, error: Exception) -> Response:
    """The middleware prints the traceback, which Starlette hands on after this."""
    status, headers, body = reply_of(bug(request.scope["request_id"]))
    return Response(body, status, headers)
