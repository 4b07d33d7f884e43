"""What the engine hands out: what a sample gained in a step. Apart from the engine, for those who
read it without torch."""

from dataclasses import dataclass

from llama_tp.sampling.params import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sample of a request gained in a step.

    `ids` hold no stop ids; `text` may lag behind them by half a character or the beginning of a
    stop string, and may be cut before a stop string that the ids still spell. `finish_reason` is
    set on the last delta: "stop", "length" or "abort", the last with an `error` when it was not the
    caller's wish. `prompt_logprobs` come once, with sample 0's first delta: one entry a prompt
    token, None for the first. `refused` says what, found and fix where the error is the caller's.
    """

    request_id: str
    index: int
    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    refused: tuple[str, str, str] | None = None
