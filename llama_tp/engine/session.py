"""Prompts in, samples out, in order: what the commands and the Python API do with an engine on the
driver."""

import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_tp.arch.errors import UserError
from llama_tp.arch.memory import GIB, weight_bytes
from llama_tp.checkpoint.hub import fetch
from llama_tp.engine.delta import Delta
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.parallel.collectives import gather_ints
from llama_tp.parallel.log import say
from llama_tp.sampling.params import SamplingParams, TokenLogprobs
from llama_tp.text.chat_format import ChatFormat, Dialog
from llama_tp.text.template import ChatTemplate, open_template


@dataclass
class Sample:
    """One completion as it grows. `tokens` are the output's ids without the stop id;
    `finish_reason` is None until the end; `prompt_logprobs` has one entry a prompt token, None for
    the first."""

    prompt: str
    prompt_ids: list[int]
    index: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    error: str | None = None

    def as_json(self, echo: bool) -> dict[str, Any]:
        """The line that `generate --json` prints; with echo, the prompt is part of generation,
        tokens and logprobs."""
        logprobs = [
            _as_json(each)
            for each in ((self.prompt_logprobs or []) if echo else []) + self.logprobs
        ]
        out = {
            "prompt": self.prompt,
            "generation": (self.prompt if echo else "") + self.text,
            "tokens": (self.prompt_ids if echo else []) + self.tokens,
            "finish_reason": self.finish_reason,
            "logprobs": logprobs or None,
        }
        return out | ({"error": self.error} if self.error else {})


def _as_json(one: TokenLogprobs | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "token": one.token,
        "logprob": one.logprob,
        "top": [{"token": t, "logprob": p} for t, p in one.top],
    }


def chat_encoder(
    engine: Engine, ckpt_dir: str, chat_template: str = "meta"
) -> ChatFormat | ChatTemplate:
    """What encodes dialogs: the Llama 3 chat format, or with "hf" the template of the checkpoint's
    folder. Raises UserError for a tokenizer, or a folder, without it."""
    if chat_template == "hf":
        return open_template(fetch(ckpt_dir, cached_only=True), engine.tokenizer)
    return ChatFormat(engine.tokenizer)


def generate(
    engine: Engine,
    prompts: Sequence[str],
    params: SamplingParams,
    chat: ChatFormat | ChatTemplate | None = None,
    system: str | None = None,
) -> Iterator[Sample]:
    """Driver: runs all prompts at once, as messages to answer if there is a `chat` to encode them,
    and yields the samples in their order, each whenever it has grown while it is its turn. Raises
    UserError before anything runs if a prompt cannot."""
    ids = [encode_prompt(engine, prompt, chat, system) for prompt in prompts]
    return run(engine, list(zip(prompts, ids)), [params] * len(prompts))


def encode_prompt(
    engine: Engine, prompt: str, chat: ChatFormat | ChatTemplate | None, system: str | None
) -> list[int]:
    """Ids of a plain prompt (BOS in front) or of a one-message chat."""
    if chat is None:
        return engine.tokenizer.encode(prompt, bos=True)
    dialog: Dialog = [] if system is None else [{"role": "system", "content": system}]
    return chat.encode_dialog([*dialog, {"role": "user", "content": prompt}])


def run(
    engine: Engine, prompts: list[tuple[str, list[int]]], params: list[SamplingParams]
) -> Iterator[Sample]:
    """Driver: as `generate`, for encoded prompts with parameters of their own. Leaving early aborts
    what still runs."""
    requests = [
        Request(f"{engine.stats.n_requests}-{i}", ids, each)
        for i, ((_, ids), each) in enumerate(zip(prompts, params))
    ]
    for number, request in enumerate(requests):
        try:
            engine.check(request)
        except UserError as e:
            if len(requests) == 1:
                raise
            raise UserError(f"prompt {number + 1}: {e.what}", e.found, e.fix) from e
    samples = [
        Sample(text, ids, index)
        for (text, ids), each in zip(prompts, params)
        for index in range(each.n)
    ]
    place = {
        (request.id, index): i
        for i, (request, index) in enumerate(
            (request, index) for request in requests for index in range(request.params.n)
        )
    }
    turn = 0
    try:
        for request in requests:
            engine.submit(request)
        while turn < len(samples):
            grown = {_grow(samples, place, delta) for delta in engine.step()}
            while turn < len(samples) and (turn in grown or samples[turn].finish_reason):
                yield samples[turn]
                if not samples[turn].finish_reason:
                    break
                turn += 1
    finally:
        for request in requests:
            engine.abort(request.id)


def _grow(samples: list[Sample], place: dict[tuple[str, int], int], delta: Delta) -> int:
    i = place[delta.request_id, delta.index]
    sample = samples[i]
    sample.text += delta.text
    sample.tokens += delta.ids
    sample.logprobs += delta.logprobs
    if delta.prompt_logprobs is not None:
        sample.prompt_logprobs = list(delta.prompt_logprobs)
    sample.finish_reason, sample.error = delta.finish_reason, delta.error
    return i


def report(engine: Engine, quiet: bool = False) -> None:
    """Every rank: prints the closing lines of a run on the driver (rates, bandwidth, peak
    memory)."""
    ranks, stats, model = engine.ranks, engine.stats, engine.worker.model
    peaks = gather_ints(peak_bytes(engine), ranks)
    if not stats.prefill_s:
        return
    say(
        f"prefill: {stats.prefill_tokens} tokens, {stats.prefill_tokens / stats.prefill_s:.1f} "
        "tok/s; first token after "
        f"{stats.first_token_s:.2f} s",
        ranks,
        quiet,
    )
    if stats.decode_s:
        shards, itemsize = model.shard.map.shards(), model.dtype.itemsize
        weights = sum(weight_bytes(shard, itemsize) for shard in shards)
        say(
            f"decode: {stats.decode_tokens} tokens, {stats.decode_tokens / stats.decode_s:.1f} "
            "tok/s, weights read at "
            f"{weights * stats.decode_steps / stats.decode_s / 1e9:.1f} GB/s",
            ranks,
            quiet,
        )
    say(
        f"peak memory: {max(peaks) / GIB:.2f} GiB on rank {peaks.index(max(peaks))}"
        + (f" (all ranks: {', '.join(f'{p / GIB:.2f}' for p in peaks)})" if ranks.tp > 1 else ""),
        ranks,
        quiet,
    )


def peak_bytes(engine: Engine) -> int:
    """This rank's peak: of the GPU's allocator, or of the process's resident memory."""
    if engine.ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.ranks.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
