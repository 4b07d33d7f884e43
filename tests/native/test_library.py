"""What Python declares of the C++ library against what the library says of itself."""

import ctypes

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.native import library, structs
from llama_tp.native.library import check, declared, load

pytestmark = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)


def interface() -> str:
    return load().interface().decode()


def test_both_sides_agree_on_every_line():
    assert interface().splitlines() == declared()
    for kind, name in (("struct", "LayerArgs"), ("field", "StepArgs.tables"), ("field", "Span.n")):
        assert any(line.startswith(f"{kind} {name} ") for line in declared())
    assert "function product_bf16 void pointer pointer pointer pointer int64 int64 int64 int64" in (
        declared()
    )


@pytest.mark.parametrize(
    "line, other",
    [
        ("field StepArgs.n_spans 56 int64", "field StepArgs.n_spans 64 int64"),  # another place
        ("field LayerArgs.eps 96 double", "field LayerArgs.eps 96 int64"),  # another type
        ("field LayerArgs.F 80 int64", "field LayerArgs.ffn 80 int64"),  # another name
        ("struct LayerArgs 144", "struct LayerArgs 152"),  # a field that Python does not know
        ("function read_all uint64 pointer int64", "function read_all uint64 pointer"),
        ("constant WIDTH 64", "constant WIDTH 32"),
    ],
)
def test_a_library_that_says_something_else_is_refused(line, other):
    text = interface()
    assert line in text.splitlines()
    with pytest.raises(UserError) as error:
        check(text.replace(line, other))
    assert other in str(error.value) and line in str(error.value)
    with pytest.raises(UserError, match="nothing of it"):
        check(text.replace(line + "\n", ""))


class Swapped(ctypes.Structure):
    """StepArgs with two fields in the wrong order: the size is right."""

    _fields_ = [
        {"T": ("S", structs.LONG), "S": ("T", structs.LONG)}.get(name, (name, kind))
        for name, kind in structs.StepArgs._fields_
    ]


Swapped.__name__ = "StepArgs"


def test_loading_checks_pythons_structures(monkeypatch):
    monkeypatch.setattr(library, "STRUCTS", (structs.Span, structs.LayerArgs, Swapped))
    with pytest.raises(
        UserError, match="library says 'field StepArgs.T 0 int64'.*'field StepArgs.S 0"
    ):
        load.__wrapped__()


def test_loading_checks_pythons_functions(monkeypatch):
    result, arguments = library._FUNCTIONS["silu_mul_"]
    monkeypatch.setitem(library._FUNCTIONS, "silu_mul_", (result, [*arguments, structs.LONG]))
    with pytest.raises(UserError, match="function silu_mul_fp32 void pointer pointer int64 int64'"):
        load.__wrapped__()
