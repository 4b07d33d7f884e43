"""Calls made on every rank, here on one; with more: tests/test_api.py."""

import pytest

from llama_tp.api import Llama
from llama_tp.arch.errors import UserError
from llama_tp.arch.weights import table
from llama_tp.parallel.groups import single_rank
from llama_tp.sampling.params import SamplingParams
from llama_tp.text.grammar import Form
from tests import reference
from tests.engines import NoWatch, engine
from tests.shapes import SHRUNK

WEIGHTS = reference.random_weights(table(SHRUNK["8b"]))
IDS = [3, 17, 99]
PARAMS = SamplingParams(temperature=0, max_tokens=5)


class Told(NoWatch):
    """A watch that keeps what it was told of."""

    def __init__(self):
        self.failed = []

    def progress(self, n_calls, n_steps):
        pass

    def fail(self, error):
        self.failed.append(error)


@pytest.fixture
def llama():
    one = engine(single_rank(), SHRUNK["8b"], weights=WEIGHTS)
    one.watch = Told()
    return Llama(one)


def test_a_call_is_refused_while_a_stream_is_open(llama):
    expected = llama.complete(IDS, PARAMS)
    stream = llama.stream(IDS, PARAMS)
    assert len(next(stream).tokens) == 1
    with pytest.raises(UserError, match="complete was called while stream .*close"):
        llama.complete(IDS, PARAMS)
    assert [len(piece.tokens) for piece in stream] == [2, 3, 4, 5]  # and harms nothing
    stream = llama.stream(IDS, PARAMS)
    next(stream)
    stream.close()
    assert (
        llama.complete(IDS, PARAMS) == expected
        and not llama.engine.has_work
        and not llama.engine.watch.failed
    )


def test_a_prompt_refused_late_leaves_none_of_the_others_behind(llama):
    """A form is read when its request is queued, after those before it."""
    expected = llama.complete(IDS, PARAMS)
    with pytest.raises(UserError):
        llama.complete([IDS, IDS], [PARAMS, SamplingParams(form=Form("regex", "("))])
    assert (
        not llama.engine.has_work
        and llama.complete(IDS, PARAMS) == expected
        and not llama.engine.watch.failed
    )


def test_metas_calls_raise_what_they_cannot_return():
    bad = WEIGHTS | {"tok_embeddings.weight": WEIGHTS["tok_embeddings.weight"] * float("nan")}
    one = engine(single_rank(), SHRUNK["8b"], weights=bad)
    one.watch = Told()
    assert "not finite" in Llama(one).complete(IDS, PARAMS).error
    with pytest.raises(UserError, match="prompt 1 .*not finite"):
        Llama(one).generate([IDS], 5)
