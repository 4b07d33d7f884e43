"""Command: prompts in, text streams out.

Text goes to stdout as it is made, or one JSON line a prompt with --json; everything else goes to
stderr.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, Protocol

from llama_tp.arch.config import check_launch
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import EngineOptions
from llama_tp.cli import run
from llama_tp.engine.request import SamplingParams


def main(
    *,
    options: EngineOptions,
    prompt: str | None = None,
    prompts_file: str | None = None,
    chat: bool = False,
    system: str | None = None,
    max_gen_len: int | None = None,
    min_tokens: int = 0,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: tuple[str, ...] = (),
    n_samples: int = 1,
    stop: tuple[str, ...] = (),
    stop_ids: tuple[int, ...] = (),
    ignore_eos: bool = False,
    echo: bool = False,
    logprobs: int | None = None,
    json: bool = False,
) -> None:
    """Write text with a Llama 3 checkpoint, on one rank or, started by llama_tp.launch, on several.

    Examples:
        python -m llama_tp.generate --ckpt_dir checkpoints/demo --prompt "ROMEO:"
        python -m llama_tp.launch --nproc_per_node 8 generate \\
            --ckpt_dir Meta-Llama-3-70B-Instruct/original --chat --prompt "Why is the sky blue?"

    Model:

    Prompts:
        prompt: the text to continue, or the user's message with --chat; - reads it from stdin
        prompts_file: one prompt a line; a line that begins with " is a JSON string, and "" the
            empty prompt
        chat: make each prompt the user's message in a chat
        chat_template: with --chat, meta for the Llama 3 chat format, hf for the template that the
            checkpoint's folder brings
        system: the system message, with --chat

    Sampling:
        max_gen_len: most tokens to write for a prompt; as many as fit in max_seq_len unless given
        min_tokens: stop neither at stop ids nor at stop strings before this many
        temperature: 0 is greedy
        top_p: keep the likeliest tokens that together have this probability
        top_k: keep the k likeliest tokens; 0 is off
        min_p: keep tokens at least this fraction as likely as the likeliest
        repetition_penalty: above 1, tokens of prompt and output become less likely
        presence_penalty: subtracted from the logits of tokens that were written, -2 to 2
        frequency_penalty: the same for each time they were
        logit_bias: ID:BIAS adds BIAS to the logit of token ID
        seed: of all draws
        n_samples: samples of each prompt
        stop: end before this text
        stop_ids: end at this token id
        ignore_eos: do not end at the tokenizer's stop ids

    Output:
        echo: print the prompt too
        logprobs: with --json, log-probability of each token and of the K likeliest
        json: one JSON line a sample: prompt, generation, tokens, finish_reason, logprobs
        quiet: print nothing but text and errors

    Resources:
    """
    texts = prompts_of(prompt, prompts_file)
    if logprobs is not None and not json:
        raise UserError(
            "--logprobs has nowhere to go", "text output shows no numbers", "add --json"
        )
    if system is not None and not chat:
        raise UserError("--system is a message of a chat", "--chat is not set", "add --chat")
    if options.chat_template != "meta" and not chat:
        raise UserError("--chat_template is for chats", "--chat is not set", "add --chat")
    check_launch(options.ckpt_dir, int(os.environ.get("WORLD_SIZE", 1)))
    with naming_flags():
        params = SamplingParams(
            max_tokens=max_gen_len,
            min_tokens=min_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=biases_of(logit_bias),
            n=n_samples,
            stop=stop,
            stop_ids=stop_ids,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
        )

    from llama_tp.engine.build import build
    from llama_tp.engine.session import chat_encoder, generate, report

    engine = build(options)
    errors = []
    try:
        if engine.is_driver:
            present = JsonLines(echo) if json else Text(echo)
            encoder = None
            if chat:
                encoder = chat_encoder(engine, options.ckpt_dir, options.chat_template)
            for sample in generate(engine, texts, params, encoder, system):
                present(sample)
                errors += [sample.error] if sample.error else []
            engine.dismiss()
        else:
            engine.follow()
        report(engine, options.quiet)
    except BrokenPipeError:
        engine.watch.fail(
            UserError(
                "stdout was closed before all text was written", "", "keep its reader running"
            )
        )
    except UserError as error:
        engine.watch.fail(error)
    engine.close()
    if errors:
        raise UserError(
            f"{len(errors)} of {len(texts) * n_samples} samples could not be completed", errors[0]
        )


def prompts_of(prompt: str | None, prompts_file: str | None) -> list[str]:
    """The prompts that the flags name. Raises UserError unless exactly one of them is given."""
    if (prompt is None) == (prompts_file is None):
        raise UserError(
            "there must be one source of prompts",
            "both --prompt and --prompts_file"
            if prompt is not None
            else "neither --prompt nor --prompts_file",
            'give --prompt "TEXT", --prompt - or --prompts_file FILE',
        )
    source = (
        ("--prompt -" if prompt == "-" else "--prompt")
        if prompts_file is None
        else f"--prompts_file {prompts_file}"
    )
    try:
        if prompts_file is None:
            text = sys.stdin.read() if prompt == "-" else prompt
            if not text:  # a shell variable that was not set, a command that failed
                raise UserError(
                    "the prompt is empty",
                    f"found no text in {source}",
                    'give some text; to begin from nothing, write "" on a line of a --prompts_file',
                )
            return [text]
        with open(prompts_file, encoding="utf-8-sig") as f:
            # no more ends a line: splitlines has U+2028 and others, too
            lines = f.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read", str(error), "give UTF-8 text") from None
    prompts = [_line(line, i, prompts_file) for i, line in enumerate(lines, start=1) if line]
    if not prompts:
        raise UserError(
            f"--prompts_file {prompts_file} holds no prompt",
            "it is empty",
            "write one prompt a line",
        )
    return prompts


def _line(line: str, number: int, file: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        text: str = json.loads(line)
    except ValueError as error:
        raise UserError(
            f'{file} line {number} begins with " and is no JSON string',
            str(error),
            'close the quote, and write a quote inside as \\"',
        ) from None
    return text


def biases_of(pairs: tuple[str, ...]) -> dict[int, float]:
    """{id: bias} from texts like "128009:-100"."""
    try:
        return {int(token): float(bias) for token, bias in (pair.split(":") for pair in pairs)}
    except ValueError:
        raise UserError(
            "--logit_bias needs ID:BIAS",
            f"found {' '.join(pairs)!r}",
            "write e.g. --logit_bias 128009:-100",
        ) from None


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """A refusal by SamplingParams names this command's flags: --max_gen_len and not max_tokens."""
    names = {field.name: field.name for field in dataclasses.fields(SamplingParams)}
    names |= {"max_tokens": "max_gen_len", "n": "n_samples"}

    def said(text: str) -> str:
        return re.sub(
            r"\w+", lambda word: f"--{names[word[0]]}" if word[0] in names else word[0], text
        )

    try:
        yield
    except UserError as error:
        raise UserError(said(error.what), said(error.found), said(error.fix)) from None


class Sample(Protocol):
    """What is read of the engine's samples, whose module imports torch."""

    prompt: str
    text: str
    finish_reason: str | None

    def as_json(self, echo: bool) -> dict[str, Any]: ...


class Text:
    """Prints samples one after the other, each as it grows."""

    def __init__(self, echo: bool):
        self.echo = echo
        self.shown: Sample | None = None

    def __call__(self, sample: Sample) -> None:
        if self.shown is not sample:
            self.shown = sample
            self.written = 0
            if self.echo:
                sys.stdout.write(sample.prompt)
        sys.stdout.write(sample.text[self.written :] + ("\n" if sample.finish_reason else ""))
        sys.stdout.flush()
        self.written = len(sample.text)


class JsonLines:
    """Prints one line a finished sample."""

    def __init__(self, echo: bool):
        self.echo = echo

    def __call__(self, sample: Sample) -> None:
        if sample.finish_reason:
            print(json.dumps(sample.as_json(self.echo), ensure_ascii=False), flush=True)


if __name__ == "__main__":
    run(main)
