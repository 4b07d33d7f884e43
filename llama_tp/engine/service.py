"""The driver's loop behind a server: messages in, deltas out, over a link that somebody else has
made.

The link has two methods: `take(wait)` gives the messages that have come in (a list; None once the
other side has gone) and `send(message)`. The messages are those of `server/link.py`; they are JSON,
so this is also where numbers that JSON does not have are mended.
"""

import time
from typing import Any, Protocol

from llama_tp.arch.errors import UserError
from llama_tp.engine.delta import Delta, TokenLogprobs
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request, SamplingParams
from llama_tp.text.grammar import Form

LEAST_LOGPROB = -9999.0  # stands for -inf, as elsewhere in OpenAI's world, and for NaN
# prompt logprobs: a long prompt's would hold up the server's event loop in one piece
SCORES_A_MESSAGE = 512


class Link(Protocol):
    """The driver's end of the connection to a server."""

    def take(self, wait: bool) -> list[dict[str, Any]] | None: ...

    def send(self, message: dict[str, Any]) -> None: ...


def serve(engine: Engine, link: Link) -> None:
    """Driver: does what the messages say until the link closes. Waits for them while there is
    nothing to compute, for hours if need be, and looks in between steps otherwise: an abort frees
    its blocks before the next step."""
    link.send({"is": "ready", **info(engine)})
    running: set[str] = set()
    while (messages := link.take(wait=not engine.has_work)) is not None:
        deltas, refused = [], {}
        for message in messages:
            if message["do"] == "abort":
                deltas += engine.abort(message["id"])
                continue
            try:
                engine.submit(request_of(message))
            except UserError as error:
                refused[message["id"]] = [error.what, error.found, error.fix]
        began = time.monotonic()
        deltas += engine.step()
        step_s = time.monotonic() - began
        ended = {delta.request_id: list(delta.refused) for delta in deltas if delta.refused}
        for request_id in ended:  # its other samples end with it
            engine.abort(request_id)
        deltas = [delta for delta in deltas if delta.request_id not in ended]
        refused |= ended
        before, running = running, {sequence.request.id for sequence in engine.scheduler.running}
        for delta in deltas:
            for scores in _pieces(delta):
                link.send({"is": "scores", "id": delta.request_id, "scores": scores})
        link.send(
            {
                "is": "step",
                "deltas": [_delta(each) for each in deltas],
                "refused": refused,
                "begun": sorted(running - before),
                "step_s": step_s,
                "stats": stats(engine),
            }
        )


def info(engine: Engine) -> dict[str, Any]:
    """What the server needs to know about the engine: sizes, and what makes its texts
    repeatable."""
    scheduler, runner = engine.scheduler, engine.runner
    return {
        "n_vocab": runner.n_vocab,
        "max_model_len": scheduler.max_len,
        "max_rows": len(scheduler.rows),
        "n_blocks": scheduler.blocks.n_blocks,
        "block_size": scheduler.blocks.block_size,
        "tp": engine.ranks.tp,
        "device": engine.ranks.device.type,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "deterministic": runner.model.deterministic,
    }


def stats(engine: Engine) -> dict[str, Any]:
    """Gauges and sums since the ranks were started."""
    scheduler, sums = engine.scheduler, engine.stats
    return {
        "n_running": scheduler.n_running,
        "n_waiting": scheduler.n_waiting,
        "kv_use": scheduler.kv_use,
        "n_preemptions": scheduler.n_preemptions,
        "prefix_hit_tokens": scheduler.prefix_hit_tokens,
        "n_steps": scheduler.n_steps,
        "prefill_tokens": sums.prefill_tokens,
        "prefill_s": sums.prefill_s,
        "decode_tokens": sums.decode_tokens,
        "decode_s": sums.decode_s,
    }


def request_of(message: dict[str, Any]) -> Request:
    """The request that a submit message holds. Raises UserError like Request."""
    params = dict(message["params"])
    if params.get("logit_bias"):
        # JSON's keys are text
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    if params.get("form"):
        params["form"] = Form(**params["form"])
    return Request(message["id"], message["prompt"], SamplingParams(**params), message["outputs"])


def _delta(delta: Delta) -> dict[str, Any]:
    return {
        "id": delta.request_id,
        "index": delta.index,
        "ids": delta.ids,
        "text": delta.text,
        "logprobs": [_score(each) for each in delta.logprobs],
        "finish_reason": delta.finish_reason,
        "error": delta.error,
    }


def _pieces(delta: Delta) -> list[list[Any]]:
    scores = delta.prompt_logprobs or ()
    if not any(scores):  # handed over before, or of a prompt of one token
        return []
    return [
        [each and _score(each) for each in scores[i : i + SCORES_A_MESSAGE]]
        for i in range(0, len(scores), SCORES_A_MESSAGE)
    ]


def _score(one: TokenLogprobs) -> list[Any]:
    # the bound comes first: max(bound, NaN) is the bound
    return [
        one.token,
        max(LEAST_LOGPROB, one.logprob),
        [[token, max(LEAST_LOGPROB, value)] for token, value in one.top],
    ]
