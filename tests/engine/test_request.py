"""Every number a caller gives is checked once, at the edge."""

import math

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.engine.request import Request, Sequence
from llama_tp.sampling.params import SamplingParams

WHOLE = ["max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs", "prompt_logprobs"]
REAL = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]


def test_defaults_are_metas_and_everything_else_is_off():
    params = SamplingParams()
    assert (params.temperature, params.top_p) == (0.6, 0.9)
    assert (params.max_tokens, params.top_k, params.min_p, params.repetition_penalty) == (
        None,
        0,
        0.0,
        1.0,
    )
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (
        0.0,
        0.0,
        None,
    )
    assert (params.stop, params.stop_ids, params.logprobs, params.prompt_logprobs, params.n) == (
        (),
        (),
        None,
        None,
        1,
    )
    assert params.seed is None and params.ignore_eos is False


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [True, 1.0, "1", 2**70, -(2**70), -2, math.nan, [1]])
def test_whole_numbers_refuse(name, value):
    if name == "seed" and value == -2:
        assert SamplingParams(seed=-2).seed == -2
        return
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e308, -1e308, True, "0.5", None, -3, 1j]
)
def test_real_numbers_refuse(name, value):
    with pytest.raises(UserError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": 1.01},
        {"temperature": 1e-9},
        {"temperature": 101},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.01},
        {"frequency_penalty": -2.01},
        {"n": 0},
        {"n": 129},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"seed": 2**63},
        {"ignore_eos": 1},
        {"ignore_eos": None},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [1]},
        {"stop": 5},
        {"stop": b"x"},
        {"stop": {"a": 1}},
        {"stop": ["a", "b" * 1001]},
        {"stop_ids": list(range(1001))},
        {"stop_ids": [-1]},
        {"stop_ids": [True]},
        {"stop_ids": "1"},
        {"stop_ids": 3},
        {"stop_ids": [2**31]},
        {"logit_bias": [1]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 100.5}},
        {"logit_bias": {True: 1.0}},
        {"min_tokens": 5, "max_tokens": 4},
    ],
)
def test_a_bad_field_is_refused_by_name(fields):
    with pytest.raises(UserError) as caught:
        SamplingParams(**fields)
    assert next(iter(fields)) in caught.value.what
    assert caught.value.found and caught.value.fix


def test_the_ends_of_every_range_are_allowed():
    ends = dict(
        max_tokens=1,
        min_tokens=1,
        temperature=0,
        top_p=1,
        top_k=1,
        min_p=1,
        repetition_penalty=0.01,
        presence_penalty=2,
        frequency_penalty=-2,
        logit_bias={0: -100, 7: 100},
        seed=-(2**63),
        n=128,
        logprobs=20,
        prompt_logprobs=0,
    )
    params = SamplingParams(**ends)
    assert {name: getattr(params, name) for name in ends} == ends


def test_values_are_normalised():
    bias = {3: 1}
    params = SamplingParams(temperature=0, top_k=-1, stop="end", stop_ids=[7, 8], logit_bias=bias)
    assert params.stop == ("end",) and params.stop_ids == (7, 8) and params.top_k == 0
    assert type(params.temperature) is float and type(params.logit_bias[3]) is float
    bias[4] = 1  # the caller's dict is not ours
    assert params.logit_bias == {3: 1.0}
    assert SamplingParams(stop=None, stop_ids=None, logit_bias={}) == SamplingParams()
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=["a" * 1000], stop_ids=[5, 5, 6] * 1000).stop_ids == (5, 6)


def test_numpy_numbers_become_plain_ones():
    numpy = pytest.importorskip(
        "numpy", reason="numbers of other libraries are taken if numpy's are"
    )
    params = SamplingParams(
        max_tokens=numpy.int64(3), temperature=numpy.float64(0.5), top_p=numpy.float32(0.5)
    )
    assert (
        type(params.max_tokens) is int
        and type(params.temperature) is float
        and type(params.top_p) is float
    )
    assert Request("a", numpy.array([1, 2])).prompt_ids == [1, 2]
    with pytest.raises(UserError, match="ignore_eos"):
        SamplingParams(ignore_eos=numpy.bool_(True))


def test_ids_are_checked_against_the_vocabulary():
    params = SamplingParams(logit_bias={99: 1.0}, stop_ids=[50])
    params.check(100)
    with pytest.raises(UserError, match="logit_bias.*99.*0 to 98"):
        params.check(99)
    with pytest.raises(UserError, match="stop_ids"):
        SamplingParams(stop_ids=[50]).check(50)
    with pytest.raises(UserError, match="the prompt.*100"):
        Request("a", [1, 100]).check(100)
    Request("a", [0, 99], params).check(100)


@pytest.mark.parametrize("ids", [[], None, [-1], [True, False], [1.0], "12", 5, [[1]], [2**63]])
def test_a_bad_prompt_is_refused(ids):
    with pytest.raises(UserError, match="the prompt"):
        Request("a", ids)


@pytest.mark.parametrize("id", ["", None, 5])
def test_a_bad_request_id_is_refused(id):
    with pytest.raises(UserError, match="id"):
        Request(id, [1])


def test_params_that_are_no_params_are_refused():
    with pytest.raises(UserError, match="params"):
        Request("a", [1], {"temperature": 0})


def test_a_request_owns_its_ids():
    ids = [1, 2]
    request = Request("a", ids)
    sequence = Sequence(request)
    sequence.ids.append(3)
    ids.append(9)
    assert request.prompt_ids == [1, 2] and sequence.output_ids == [3] and sequence.n_output == 1


def test_only_sample_0_scores_the_prompt_and_only_once():
    request = Request("a", [1, 2], SamplingParams(prompt_logprobs=0, n=2))
    first, second = Sequence(request, 0), Sequence(request, 1)
    assert (
        first.scores_prompt
        and not second.scores_prompt
        and not Sequence(Request("b", [1])).scores_prompt
    )
    first.ids.append(5)
    assert not first.scores_prompt


def test_the_error_text_stays_short():
    with pytest.raises(UserError) as caught:
        SamplingParams(top_p="x" * 100_000)
    assert len(str(caught.value)) < 300
