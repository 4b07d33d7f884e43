"""Calls made on every rank, here on one; with more: tests/test_api.py."""

import pytest

from llama_tp.api import Llama
from llama_tp.engine.request import SamplingParams
from llama_tp.parallel.groups import single_rank
from llama_tp.spec.errors import UserError
from tests.engines import NoWatch, engine
from tests.shapes import SHRUNK

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


def test_a_call_is_refused_while_a_stream_is_open():
    one = engine(single_rank(), SHRUNK["8b"])
    one.watch = Told()
    llama = Llama(one)
    expected = llama.complete(IDS, PARAMS)
    stream = llama.stream(IDS, PARAMS)
    assert len(next(stream).tokens) == 1
    with pytest.raises(UserError, match="complete was called while stream .*close"):
        llama.complete(IDS, PARAMS)
    assert [len(piece.tokens) for piece in stream] == [2, 3, 4, 5]           # and harms nothing
    stream = llama.stream(IDS, PARAMS)
    next(stream)
    stream.close()
    assert llama.complete(IDS, PARAMS) == expected and not one.has_work and not one.watch.failed
