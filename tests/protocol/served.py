"""What the tests of this room share: the demo model's tokenizer behind a ServedModel, deltas as the
engine makes them, and an engine without a model, whose tokens follow from the request alone."""

import hashlib
from collections import deque
from pathlib import Path

from llama_tp.engine.delta import Delta
from llama_tp.protocol.fields import check_body
from llama_tp.protocol.order import Limits, Order, ServedModel, prepare
from llama_tp.sampling.params import TokenLogprobs
from llama_tp.text.tokenizer import open_tokenizer

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
TOKENIZER = open_tokenizer(None, str(DEMO))
MODEL = ServedModel(
    "demo", TOKENIZER, 256, TOKENIZER.n_vocab, Limits(max_n=8, max_prompts=16, max_samples=64)
)
USER = [{"role": "user", "content": "Hi"}]


def chat(**fields) -> Order:
    """The order of a chat body."""
    return prepare(check_body("chat", {"messages": USER} | fields), MODEL, "chatcmpl-1")


def completion(**fields) -> Order:
    """The order of a completions body."""
    return prepare(check_body("completion", {"prompt": "ROMEO:"} | fields), MODEL, "cmpl-1")


def delta(
    order: Order,
    text: str = "",
    ids=(),
    index: int = 0,
    prompt: int = 0,
    end: str | None = None,
    **others,
) -> Delta:
    """What sample `index` of prompt `prompt` gained."""
    return Delta(order.requests[prompt].id, index, tuple(ids), text, finish_reason=end, **others)


def score(token: int, logprob: float = -1.0, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(token, logprob, top)


class FakeEngine:
    """Takes requests and gives each sample `min(max_tokens, 1 to 9)` tokens, as its seed and prompt
    decide, one a step, at most `n_rows` samples at once. What it was given is in `submitted`; a
    prompt with `poison` in it ends with an error."""

    def __init__(self, n_rows: int = 4, poison: int = -1):
        self.n_rows, self.poison = n_rows, poison
        self.waiting: deque = deque()
        self.running: list = []
        self.submitted, self.most_open = 0, 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request) -> None:
        self.submitted += 1
        for index in range(request.params.n):
            digest = hashlib.sha256(
                f"{request.params.seed}/{index}/{request.prompt_ids}".encode()
            ).digest()
            ids = [65 + value % 26 for value in digest[: 1 + digest[0] % 9]][
                : request.params.max_tokens
            ]
            self.waiting.append((request, index, deque(ids)))
        self.most_open = max(self.most_open, len(self.waiting) + len(self.running))

    def abort(self, request_id: str) -> list[Delta]:
        for queue in (self.waiting, self.running):
            for each in [each for each in queue if each[0].id == request_id]:
                queue.remove(each)
        return []

    def step(self) -> list[Delta]:
        while self.waiting and len(self.running) < self.n_rows:
            self.running.append(self.waiting.popleft())
        deltas = []
        for row in list(self.running):
            request, index, ids = row
            if self.poison in request.prompt_ids:
                self.running.remove(row)
                deltas.append(Delta(request.id, index, finish_reason="abort", error="not finite"))
                continue
            token = ids.popleft()
            deltas.append(
                Delta(
                    request.id, index, (token,), chr(token), finish_reason=None if ids else "stop"
                )
            )
            if not ids:
                self.running.remove(row)
        return deltas
