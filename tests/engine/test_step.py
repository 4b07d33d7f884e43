"""A step survives its journey as plain ints, and nothing else passes for one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_tp.engine.step import Step, StepRow
from llama_tp.sampling.params import DRAWN_MODES, Draw, SamplingMode

COUNT = st.integers(0, 2**31 - 1)
IDS = st.lists(COUNT, max_size=6).map(tuple)


@st.composite
def step_rows(draw, row):
    ids = draw(IDS)
    return StepRow(
        row,
        draw(COUNT),
        len(ids) or 1,
        ids,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(COUNT),
        draw(IDS),
        mode := draw(st.sampled_from(SamplingMode)),
        Draw(*draw(st.tuples(*[COUNT] * 5))) if mode in DRAWN_MODES else None,
    )


@st.composite
def steps(draw):
    numbers = draw(st.lists(st.integers(0, 1000), max_size=5, unique=True))
    return Step(draw(st.integers(0, 2**62)), tuple(draw(step_rows(number)) for number in numbers))


EXAMPLE = Step(
    7,
    (
        StepRow(3, 9, 1, (), True, False, 2, (), SamplingMode.GREEDY),
        StepRow(0, 4, 3, (11, 12, 13), False, True, 0, (5, 6)),
    ),
)


def test_the_wire_format():
    magic = int.from_bytes(b"STEP", "big")
    assert EXAMPLE.encode() == [
        magic,
        23,
        7,
        2,
        3,
        9,
        1,
        5,
        2,
        0,
        1,
        0,
        4,
        3,
        2,
        0,
        2,
        0,
        11,
        12,
        13,
        5,
        6,
    ]
    drawn = StepRow(3, 9, 1, (), True, False, 2, (), SamplingMode.TOP_K_TOP_P, Draw(1, 2, 3, 4, 5))
    assert Step(8, (drawn,)).encode()[4:] == [3, 9, 1, 5, 2, 0, 2, 1, 2, 3, 4, 5]


def test_what_a_row_says_of_itself():
    decode, prefill = EXAMPLE.rows
    assert (
        decode.decodes
        and not decode.fresh
        and prefill.fresh
        and not prefill.decodes
        and EXAMPLE.n_tokens == 4
    )


@given(steps())
def test_round_trip(step):
    ints = step.encode()
    # as it travels: modes are plain ints then
    again = Step.decode(torch.tensor(ints).tolist())
    assert again == step
    kinds = (int, int, int, tuple, bool, bool, int, tuple, SamplingMode)
    assert [tuple(map(type, row))[:9] for row in again.rows] == [kinds] * len(step.rows)


@given(steps(), st.data())
def test_a_cut_or_lengthened_message_is_refused(step, data):
    ints = step.encode()
    cut = data.draw(st.integers(0, len(ints) - 1))
    for broken in (ints[:cut], ints + [0], ints[:cut] + ints[cut + 1 :]):
        with pytest.raises(ValueError):
            Step.decode(broken)
    relabelled = ints[:cut]  # cut, and the length put right
    if cut >= 2:
        relabelled[1] = cut
        with pytest.raises(ValueError):
            Step.decode(relabelled)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_noise_is_refused(ints):
    with pytest.raises(ValueError):
        Step.decode(ints)


@given(steps(), st.data())
def test_a_changed_int_is_refused_or_gives_another_step(step, data):
    """Never an endless loop, another exception, or the same step from other ints: the format has
    one spelling."""
    ints = step.encode()
    at = data.draw(st.integers(0, len(ints) - 1))
    ints[at] = data.draw(st.integers(-(2**63), 2**63 - 1).filter(lambda value: value != ints[at]))
    try:
        again = Step.decode(ints)
    except ValueError:
        return
    assert again != step and again.encode() == ints


@pytest.mark.parametrize(
    "at, value",
    [
        (0, 0),
        (3, 1),
        (3, 3),
        (3, 2**62),
        (5, -1),
        (6, 2),
        (6, 0),
        (7, 8),
        (13, 2**62),
        (16, 2**62),
        (11, 3),
    ],
)
def test_damage_to_each_count_is_refused(at, value):
    ints = EXAMPLE.encode()
    ints[at] = value
    with pytest.raises(ValueError):
        Step.decode(ints)
