"""A load of requests on any OpenAI-compatible server, and what its clients see: times to the first
and between tokens, throughput.

The numbers and their names are those of `vllm bench serve`, so that its plot scripts read ours:
TTFT is from sending to the first piece of text, ITL the gap between two pieces, TPOT (end - first
piece) / (tokens - 1) once a request of two tokens or more, E2EL the whole request. Tokens are
counted by the server (stream_options.include_usage), else one a piece. One process with one thread:
above some 5,000 pieces a second it measures itself. Needs httpx (an extra), and neither torch nor a
tokenizer.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from llama_tp.arch.errors import UserError
from llama_tp.benchmarks.served import Outcome, result_of
from llama_tp.protocol.events import Events

try:
    import httpx
except ImportError:  # said by `measure`
    httpx = None  # type: ignore[assignment]  # asked for before it is used

LIMITS = ("ttft", "tpot", "itl", "e2el")  # what --goodput can limit, in ms
# Short common words: one token or so each in any vocabulary of a size, letters in a tiny one.
WORDS = (
    "the of and to in is was he for it with as his on be at by had are but from or have an they "
    "which one you were her all "
    "she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only "
    "other new some could time these two may then do first any my now such like our over man me "
    "even most made also"
).split()


@dataclass(frozen=True)
class Load:
    """What to send. `request_rate` is requests a second with exponential gaps (Poisson), None: all
    at once; `concurrency` is the most requests under way at once, None: no limit. `goodput` has
    limits in ms by name. Lengths are in tokens; they spread evenly over +- `spread` of themselves.
    UserError for values that make no sense."""

    url: str
    model: str | None = None
    chat: bool = False
    n_requests: int = 32
    input_len: int = 128
    output_len: int = 128
    spread: float = 0.5
    request_rate: float | None = None
    concurrency: int | None = None
    prompts_file: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 1
    api_key: str | None = None
    goodput: dict[str, float] = field(default_factory=dict)
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                "--url is not the address of a server",
                f"found {self.url!r}",
                "write --url http://127.0.0.1:8000",
            )
        for name in (
            "n_requests",
            "input_len",
            "output_len",
            "request_rate",
            "concurrency",
            "timeout_s",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} must be above 0", f"found {value}", "correct it")
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError(
                "an API key is made of ASCII characters",
                "this one is not",
                "correct --api_key, or OPENAI_API_KEY",
            )
        if not 0 <= self.spread < 1:
            raise UserError(
                "--spread must be at least 0 and below 1", f"found {self.spread}", "correct it"
            )

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def endpoint(self) -> str:
        return f"{self.root}/v1/chat/completions" if self.chat else f"{self.root}/v1/completions"


def limits_of(goodput: tuple[str, ...]) -> dict[str, float]:
    """{"ttft": 200.0} from ("ttft:200",). UserError for anything else."""
    try:
        limits = {name: float(ms) for name, ms in (one.split(":") for one in goodput)}
    except ValueError:
        limits = {"": 0.0} if goodput else {}
    if wrong := [name for name, ms in limits.items() if name not in LIMITS or not ms > 0]:
        raise UserError(
            "--goodput needs NAME:MS",
            f"found {' '.join(goodput)!r}{' with ' + wrong[0] if wrong[0] else ''}",
            f"for example --goodput ttft:200 --goodput tpot:50; the names are {', '.join(LIMITS)}",
        )
    return limits


def prompts_in(path: str) -> list[str]:
    """The prompts of a file: a text a line, or a JSON object with a "prompt". UserError for a file
    without any."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [line.rstrip("\n") for line in f if line.strip()]
        prompts = [json.loads(line)["prompt"] if line.startswith("{") else line for line in lines]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise UserError(
            f"--prompts_file {path} cannot be read",
            f"{type(error).__name__}: {error}",
            'write a prompt a line, or {"prompt": "..."}',
        ) from None
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(
            f"--prompts_file {path} must hold texts",
            f"found {len(prompts)} lines",
            "write a prompt a line",
        )
    return prompts


def measure(load: Load, show: Callable[[str], None]) -> dict[str, Any]:
    """Sends the load; `show` gets a line now and then. -> the result, with the lists of --save.
    UserError if the server cannot be reached, refuses a first request, or all fail."""
    if httpx is None:
        raise UserError(
            "bench serve needs httpx", "it is not installed", "pip install 'llama_tp[bench]'"
        )
    return asyncio.run(_measure(load, show))


async def _measure(load: Load, show: Callable[[str], None]) -> dict[str, Any]:
    draw = random.Random(load.seed)
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # trust_env: a proxy from the environment is no part of what is measured
    async with httpx.AsyncClient(
        headers=headers, limits=limits, timeout=load.timeout_s, trust_env=False
    ) as client:
        try:
            model = (
                load.model
                or (await client.get(f"{load.root}/v1/models"))
                .raise_for_status()
                .json()["data"][0]["id"]
            )
            bodies = await _bodies(load, model, client, draw)
            first = await _send(
                client,
                load,
                {**bodies[0], "max_tokens": min(2, bodies[0]["max_tokens"])},
                time.perf_counter(),
            )
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"there is no OpenAI-compatible server at {load.url}",
                f"{type(error).__name__}: {error}"[:300],
                "start one, or give its address and --api_key",
            ) from None
        if first.error:
            raise UserError(
                "the server refuses a first request",
                first.error[:300],
                "see --model, --chat, --no_ignore_eos, and its log",
            )
        show(f"{load.n_requests} requests to {load.url}, model {model}")
        began = time.perf_counter()
        outcomes = await _all(client, load, bodies, draw, began, show)
        duration = time.perf_counter() - began
    if all(outcome.error for outcome in outcomes):
        raise UserError("every request failed", outcomes[0].error[:300], "see the server's log")
    about = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": "openai-chat" if load.chat else "openai",
        "model_id": model,
        "num_prompts": load.n_requests,
        "request_rate": load.request_rate or "inf",
        "max_concurrency": load.concurrency,
    }
    return about | result_of(outcomes, duration, load.goodput)


async def _bodies(
    load: Load, model: str, client: "httpx.AsyncClient", draw: random.Random
) -> list[dict[str, Any]]:
    """The JSON of each request."""
    texts = prompts_in(load.prompts_file) if load.prompts_file else None
    bodies = []
    for i in range(load.n_requests):
        text = texts[i % len(texts)] if texts else await _random_prompt(load, client, draw)
        body = {
            "model": model,
            "max_tokens": _spread(load.output_len, load.spread, draw),
            "temperature": load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {"messages": [{"role": "user", "content": text}]} if load.chat else {"prompt": text}
        bodies.append(body | ({"ignore_eos": True} if load.ignore_eos else {}))
    return bodies


def _spread(length: int, spread: float, draw: random.Random) -> int:
    return max(1, round(length * draw.uniform(1 - spread, 1 + spread)))


async def _random_prompt(load: Load, client: "httpx.AsyncClient", draw: random.Random) -> str:
    """Random words, as many tokens as asked for where the server has /tokenize, else as many
    words."""
    n = _spread(load.input_len, load.spread, draw)
    text = " ".join(draw.choices(WORDS, k=n))
    reply = await client.post(
        f"{load.root}/tokenize", json={"prompt": text, "add_special_tokens": False}
    )
    if reply.status_code == 200:
        reply = await client.post(
            f"{load.root}/detokenize", json={"tokens": reply.json()["tokens"][:n]}
        )
    return str(reply.json()["prompt"]) if reply.status_code == 200 else text


async def _all(
    client: "httpx.AsyncClient",
    load: Load,
    bodies: list[dict[str, Any]],
    draw: random.Random,
    began: float,
    show: Callable[[str], None],
) -> list[Outcome]:
    """Sends every request at its time. -> the outcomes in the order of sending."""
    gate = asyncio.Semaphore(load.concurrency or len(bodies))
    done: Counter[bool] = Counter()  # by whether it has failed

    async def one(body: dict[str, Any], turn: float) -> Outcome:
        await asyncio.sleep(turn - (time.perf_counter() - began))
        async with gate:
            outcome = await _send(client, load, body, began)
        outcome.queue = max(0.0, outcome.start - turn)
        done[bool(outcome.error)] += 1
        if sum(done.values()) % max(1, len(bodies) // 10) == 0:
            show(
                f"{sum(done.values())} of {len(bodies)} done"
                + (f", {done[True]} failed" if done[True] else "")
            )
        return outcome

    turn, tasks = 0.0, []
    for body in bodies:
        tasks.append(asyncio.create_task(one(body, turn)))
        turn += draw.expovariate(load.request_rate) if load.request_rate else 0.0
    return await asyncio.gather(*tasks)


async def _send(
    client: "httpx.AsyncClient", load: Load, body: dict[str, Any], began: float
) -> Outcome:
    """One request. Whatever happens to it is in its outcome."""
    sent = time.perf_counter()
    outcome = Outcome(start=sent - began, n_input=len(body.get("prompt", "").split()))
    last, events = sent, Events()
    usage: dict[str, Any] = {}
    pieces: list[str] = []
    try:
        async with client.stream("POST", load.endpoint, json=body) as reply:
            if reply.status_code != 200:
                said = (await reply.aread()).decode(errors="replace")
                outcome.error = f"HTTP {reply.status_code}: {said[:300]}"
                return outcome
            async for event in _events(reply, events):
                if event.get("error"):
                    outcome.error = json.dumps(event["error"])[:300]
                    return outcome
                usage = event.get("usage") or usage
                text = "".join(map(_text_of, event.get("choices") or []))
                if text:
                    now = time.perf_counter()
                    if pieces:
                        outcome.itls.append(now - last)
                    else:
                        outcome.ttft = now - sent
                    pieces.append(text)
                    last = now
    except (httpx.HTTPError, ValueError, AttributeError, TypeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"[:300]
        return outcome
    if not events.done:
        outcome.error = "the stream ended without [DONE]"
    outcome.latency = (last if pieces else time.perf_counter()) - sent
    outcome.ttft = outcome.ttft if pieces else outcome.latency  # tokens without any text
    outcome.text = "".join(pieces)
    outcome.n_input = usage.get("prompt_tokens", outcome.n_input)
    outcome.n_output = usage.get("completion_tokens", len(pieces))
    return outcome


async def _events(reply: "httpx.Response", events: Events) -> AsyncIterator[dict[str, Any]]:
    """What a streamed reply says, up to its [DONE]."""
    async for data in reply.aiter_bytes():
        for event in events.push(data):
            yield event
        if events.done:
            return


def _text_of(choice: dict[str, Any]) -> str:
    """The text of a piece of an answer, of a completion or of a call of a tool."""
    delta = choice.get("delta") or {}
    calls = (call.get("function") or {} for call in delta.get("tool_calls") or [])
    return (
        choice.get("text")
        or delta.get("content")
        or "".join((call.get("name") or "") + (call.get("arguments") or "") for call in calls)
    )
