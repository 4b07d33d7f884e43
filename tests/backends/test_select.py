"""What is chosen on which machine, and that the better one that is not taken is said, with the
reason."""

import pytest
import torch

from llama_tp.backends import select
from llama_tp.backends.attention.native import NativeAttention
from llama_tp.backends.attention.tiles import TileAttention
from llama_tp.backends.base import LayerShape, Peers
from llama_tp.backends.linear.dense import DenseLinear
from llama_tp.backends.linear.native import NativeLinear
from llama_tp.model.llama import TorchElementwise
from llama_tp.native.calls import Functions
from llama_tp.native.library import load

CPU = torch.device("cpu")
SHAPE = LayerShape(64, 4, 2, 16, 128, 1e-5, 1, 1)
NEEDS_LIBRARY = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)


class Sums:
    """Stands where shared memory does."""

    place, late = None, "late"


def chosen(shape=SHAPE, dtype=torch.float32, tp=1, sums=None) -> select.Backends:
    peers = Peers(0, tp, lambda mine: [], sums, lambda n: None)
    return select.select(CPU, dtype, shape, True, TorchElementwise(), peers)


@NEEDS_LIBRARY
@pytest.mark.parametrize("tp, sums", [(1, None), (2, Sums())])
def test_all_is_in_cpp_where_it_can_be(tp, sums):
    if Functions(load(), torch.float32).inputs_together == 0:
        pytest.skip("this CPU has AMX")
    ours = chosen(tp=tp, sums=sums)
    assert isinstance(ours.attention, NativeAttention) and ours.make_layers is not None
    assert ours.name == "C++" and ours.not_taken == ()


def test_without_the_library_all_is_torch_and_it_is_said_how_to_build_it(monkeypatch):
    monkeypatch.setattr(select, "load", lambda: None)
    ours = chosen()
    assert isinstance(ours.attention, TileAttention) and ours.make_layers is None
    assert ours.name == "torch"
    assert len(ours.not_taken) == 1 and "llama_tp.native.build" in ours.not_taken[0]


@NEEDS_LIBRARY
def test_fp16_is_torch_on_cpu():
    ours = chosen(dtype=torch.float16)
    assert ours.name == "torch"
    assert [said.endswith("do not compute in float16") for said in ours.not_taken] == [True]


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    "changes, tp, why",
    [
        ({"ffn_dim": 45, "w2_chunks": 2}, 1, "w2 has 45 inputs in 2 parts"),
        ({"wo_chunks": 2, "w2_chunks": 4}, 1, "wo is in 2 parts and w2 in 4"),
        ({}, 2, "not in shared memory"),
    ],
)
def test_layers_that_cannot_be_one_call_say_why(changes, tp, why):
    ours = chosen(SHAPE._replace(**changes), tp=tp)
    assert isinstance(ours.attention, NativeAttention) and ours.make_layers is None
    assert len(ours.not_taken) == 1 and why in ours.not_taken[0]


@NEEDS_LIBRARY
def test_where_products_are_onednn_s_layers_go_one_by_one(monkeypatch):
    monkeypatch.setattr(select, "select_linears", lambda device, dtype: (select.DENSE,))
    ours = chosen()
    assert ours.make_layers is None and ours.name == "torch + C++"
    assert len(ours.not_taken) == 1 and "oneDNN" in ours.not_taken[0]
    assert type(ours.linear(torch.ones(64, 64))) is DenseLinear


@NEEDS_LIBRARY
def test_a_weight_goes_to_the_first_backend_that_takes_it():
    if Functions(load(), torch.bfloat16).inputs_together == 0:
        pytest.skip("this CPU has AMX")
    ours = chosen(dtype=torch.bfloat16)
    even, odd = torch.ones(8, 64).bfloat16(), torch.ones(8, 63).bfloat16()
    assert type(ours.linear(even)) is NativeLinear and type(ours.linear(odd, 2)) is DenseLinear
    assert type(ours.embedding(even.clone(), tied=True)) is NativeLinear
    assert type(ours.embedding(even.clone(), tied=False)) is DenseLinear
