"""A request that was interrupted goes on from its tokens, in another engine, as if nothing had
happened."""

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.engine.request import Request
from llama_tp.parallel.groups import single_rank
from llama_tp.sampling.params import SamplingParams
from tests.engines import engine
from tests.shapes import SHRUNK

PROMPT, TINY = [3, 1, 4, 1, 5, 9, 2, 6], SHRUNK["8b"]


def advance(one, request, n_steps=999) -> list:
    """The deltas of up to n_steps steps."""
    one.submit(request)
    deltas = []
    while one.has_work and n_steps:
        deltas += one.step()
        n_steps -= 1
    return deltas


def folded(deltas, n) -> list[tuple]:
    """(ids, text, finish reason) of each sample."""
    return [
        (
            sum((list(d.ids) for d in deltas if d.index == i), []),
            "".join(d.text for d in deltas if d.index == i),
            next((d.finish_reason for d in deltas if d.index == i and d.finish_reason), None),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def plain_text():
    """What the first sample writes without a stop string."""
    one = engine(single_rank(), TINY, deterministic=True)
    return folded(
        advance(one, Request("a", PROMPT, SamplingParams(max_tokens=12, temperature=1.0, seed=5))),
        1,
    )[0][1]


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=1.0, n=3),
        dict(temperature=1.0, presence_penalty=1.5, frequency_penalty=1.0, repetition_penalty=1.3),
        dict(temperature=0.0, frequency_penalty=2.0, logprobs=2),
        dict(temperature=1.0, stop=True),
        dict(temperature=1.0, stop=True, min_tokens=3),
        dict(temperature=1.0, n=2, stop=True, prompt_logprobs=1),
    ],
)
def test_every_break_is_mended(params, plain_text):
    """Broken after 1, 2, ... steps; the stop string straddles some of these breaks, and one sample
    may have ended."""
    params = {**params, **({"stop": plain_text[5:8]} if "stop" in params else {})}
    params = SamplingParams(max_tokens=12, top_p=1.0, seed=5, **params)
    whole = advance(engine(single_rank(), TINY, deterministic=True), Request("a", PROMPT, params))
    for n_steps in range(1, 12):
        before = advance(
            engine(single_rank(), TINY, deterministic=True), Request("a", PROMPT, params), n_steps
        )
        outputs = tuple(
            None if reason else tuple(ids) for ids, _, reason in folded(before, params.n)
        )
        if all(ids is None for ids in outputs):
            break
        after = advance(
            engine(single_rank(), TINY, deterministic=True), Request("a", PROMPT, params, outputs)
        )
        assert folded(before + after, params.n) == folded(whole, params.n), n_steps
        assert [d.logprobs for d in before + after if d.index == 0] == [
            d.logprobs for d in whole if d.index == 0
        ]
        scores = [
            d.prompt_logprobs
            for d in before + after
            if d.prompt_logprobs and any(d.prompt_logprobs)
        ]
        assert len(scores) == (params.prompt_logprobs is not None)


def test_outputs_are_checked():
    with pytest.raises(UserError, match="an output for each sample - found 1, and n is 2"):
        Request("a", PROMPT, SamplingParams(n=2), ((1,),))
    one = engine(single_rank(), TINY)
    with pytest.raises(UserError, match="outside the vocabulary"):
        one.submit(Request("a", PROMPT, SamplingParams(), ((TINY.vocab_size,),)))
    with pytest.raises(UserError, match="too long - found 1024 tokens"):
        one.submit(Request("a", PROMPT, SamplingParams(), ((1,) * 1016,)))
    assert not one.has_work


def test_an_output_that_is_complete_is_refused():
    """Nobody would end it: its length passes the limit at once."""
    with pytest.raises(
        UserError, match="already has max_tokens - found 2 tokens, and max_tokens 2"
    ):
        Request("a", PROMPT, SamplingParams(max_tokens=2), ((1, 2),))
    assert Request("a", PROMPT, SamplingParams(max_tokens=2), ((1,),)).n_written == 1
