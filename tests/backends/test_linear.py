"""Products in C++, by oneDNN and plain: right, and with the bits that they promise."""

import pytest
import torch
import torch.nn.functional as F

from llama_tp.arch.summation import tree_add
from llama_tp.backends.linear.dense import DenseLinear, DenseLinears
from llama_tp.backends.linear.native import NativeLinear
from llama_tp.backends.select import select_linears
from llama_tp.native.calls import DTYPES
from llama_tp.native.library import load

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest result
# (out, in): less than a block, an odd number of inputs, blocks that are not full, whole ones,
# inputs that take several turns
SHAPES = [(4, 8), (33, 45), (200, 48), (128, 256), (192, 2304)]
WAYS = ["C++", "torch"]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.25
    ).to(dtype)


def linear(way: str, weight: torch.Tensor, n_chunks: int = 1, embeds: bool = False):
    backends = (DenseLinears(),)
    if way != "torch":
        if load() is None:
            pytest.skip("the C++ parts are not built here: python -m llama_tp.native.build")
        backends = select_linears(torch.device("cpu"), weight.dtype)
    one = next(each for each in backends if each.takes(weight.shape[1], n_chunks))
    return one.embedding(weight.clone()) if embeds else one.linear(weight.clone(), n_chunks)


def test_this_machine_has_the_fast_way():
    """The machine that CI runs on does; or every test of it here would be one of torch's."""
    if (
        load() is None
        or not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        or torch.cpu._is_amx_tile_supported()
    ):
        pytest.skip("needs the C++ parts, AVX-512 and no AMX")
    for dtype in DTYPES:
        assert isinstance(linear("C++", normal(64, 64, dtype=dtype)), NativeLinear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right(shape, way, dtype):
    weight = normal(*shape, dtype=dtype)
    for n_chunks in (1, 2):
        ours = linear(way, weight, n_chunks)
        for T in (1, 2, 5, 6, 7, 23, 32, 250, 700):
            x = normal(T, shape[1], dtype=dtype, seed=T)
            exact = F.linear(x.double(), weight.double())
            most = CLOSE[dtype] * exact.abs().max()
            assert (ours(x) - exact).abs().max() < most and ours(x).dtype == dtype
            sums = ours.partial_sums(x)
            assert (sums - exact).abs().max() < most and sums.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_a_row_does_not_depend_on_its_company(shape, way, dtype):
    """From min_rows rows on: neither on the other rows, nor on which of the weight's rows are
    held here, nor on threads."""
    weight, x = normal(*shape, dtype=dtype), normal(600, shape[1], dtype=dtype, seed=1)
    ours, half = linear(way, weight), linear(way, weight[shape[0] // 2 :])
    if isinstance(ours, DenseLinear) and not ours.packed:
        pytest.skip(f"needs oneDNN's packed linear in {dtype}, which this machine lacks")
    whole, n_threads = ours(x), torch.get_num_threads()
    for T in (ours.min_rows, 2, 3, 7, 16, 17, 64, 127, 511, 513):
        assert torch.equal(ours(x[:T]), whole[:T]), T
        assert torch.equal(ours(x[-T:]), whole[-T:]), T
        assert torch.equal(half(x[:T]), whole[:T, shape[0] // 2 :]), T
    try:
        torch.set_num_threads(3 - min(n_threads, 2))
        assert torch.equal(ours(x), whole)
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_chunks", [2, 3, 8])
def test_chunks_are_products_of_their_own(n_chunks, way, dtype):
    """So that a rank with half of them has half of the tree."""
    weight, x = (
        normal(100, 48 * n_chunks, dtype=dtype),
        normal(9, 48 * n_chunks, dtype=dtype, seed=1),
    )
    parts = [
        linear(way, chunk.contiguous()).partial_sums(part.contiguous())
        for chunk, part in zip(weight.chunk(n_chunks, dim=1), x.chunk(n_chunks, dim=1))
    ]
    ours = linear(way, weight, n_chunks)
    assert torch.equal(ours.partial_sums(x), tree_add(parts))
    assert torch.equal(ours(x), tree_add(parts).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookups_are_exact(shape, way, dtype):
    weight = normal(*shape, dtype=dtype)
    ours, ids = linear(way, weight, embeds=True), torch.arange(shape[0]).flip(0)
    assert torch.equal(ours.embedding(ids), weight[ids])
    for wrong in (-1, shape[0]):
        with pytest.raises(IndexError):
            ours.embedding(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_row(way, dtype):
    x = normal(20, 64, dtype=dtype)
    x[3, 5] = float("nan")
    out = linear(way, normal(70, 64, dtype=dtype))(x)
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()
