"""What the checked calls refuse, and that they pass the rest on unchanged."""

import time
from array import array
from collections.abc import Callable

import pytest
import torch

from llama_tp.native.calls import (
    DTYPES,
    Functions,
    Layers,
    LayerSizes,
    LayerTensors,
    Numerators,
    Place,
    SharedMemory,
    padded,
    read_all,
    require,
    require_rows,
)
from llama_tp.native.library import load

if load() is None:  # what follows makes functions of the library while it is collected
    pytest.skip(
        "the C++ parts are not built here: python -m llama_tp.native.build",
        allow_module_level=True,
    )

T, D, H, K, E, F, N, S, R, V = 3, 32, 4, 2, 8, 24, 5, 16, 3, 40
SPANS, TABLES = array("q", [0, 0, 2, 0, 2, 7, 1, 1]), array("i", [0, 3])
Arguments = dict[str, torch.Tensor]


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def cache(dtype) -> Arguments:
    shape = N, K, S, E
    return {"k_cache": torch.zeros(shape, dtype=dtype), "v_cache": torch.zeros(shape, dtype=dtype)}


def layer_tensors(dtype) -> Arguments:
    shapes = {
        "attention_norm": (D,),
        "wqkv": (padded((H + 2 * K) * E), D),
        "wo": (padded(D), H * E),
        "ffn_norm": (D,),
        "w13": (padded(2 * F), D),
        "w2": (padded(D), F),
    }
    return {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}


def layers(dtype, **tensors: torch.Tensor) -> Layers:
    functions = Functions(load(), dtype)
    return Layers(functions, [LayerTensors(**tensors)], LayerSizes(H, K, E, F, 1e-5))


def run_layers(dtype, x, cos, sin, blocks, offsets, k_cache, v_cache) -> torch.Tensor:
    runner = layers(dtype, **layer_tensors(dtype))
    step = runner.step(T, cos, sin, blocks, offsets, SPANS, TABLES, True)
    out = runner(x, step, [(k_cache, v_cache)])
    assert out is not None
    return out


def cases(dtype) -> dict[str, tuple[Callable, Arguments]]:
    """Each checked call as a function of tensors that it accepts."""
    f, numerators = Functions(load(), dtype), Numerators(load())
    angles = normal(T, 1, E // 2)
    rotary = {"cos": angles.cos(), "sin": angles.sin()}
    slots = {"blocks": ints(0, 0, 3), "offsets": ints(0, 1, 7)}
    logits = {"logits": normal(R, V), "temperature": torch.ones(R, 1), "best": normal(R, 1)}
    weight = {"weight": normal(64, D, dtype=dtype)}
    x, k, v = (normal(T, D, dtype=dtype), *normal(2, T, K, E, dtype=dtype))
    return {
        "attend": (
            lambda **a: f.attend(**a, spans=SPANS, tables=TABLES, complete=True),
            {"q": normal(T, H, E, dtype=dtype), **cache(dtype)},
        ),
        "write_kv": (f.write_kv, {"k": k, "v": v, **slots, **cache(dtype)}),
        "add_norm": (
            lambda **a: f.add_norm(**a, eps=1e-5),
            {"x": x, "delta": x.clone(), "weight": normal(D, dtype=dtype)},
        ),
        "rotate": (f.rotate, {"x": normal(T, H, E, dtype=dtype), **rotary}),
        "silu_mul": (f.silu_mul, {"gate_up": normal(T, 2 * F, dtype=dtype)}),
        "pack": (f.pack, weight),
        "product": (lambda **a: f.product(**a, n_out=50, n_chunks=2), {"x": x, **weight}),
        "partial_sums": (lambda **a: f.partial_sums(**a, n_out=50, n_chunks=2), {"x": x, **weight}),
        "embedding": (lambda **a: f.embedding(**a, n_out=50), {**weight, "ids": ints(0, 49)}),
        "layer": (lambda **a: layers(dtype, **a), layer_tensors(dtype)),
        "layers": (
            lambda **a: run_layers(dtype, **a),
            {"x": x.clone(), **rotary, **slots, **cache(dtype)},
        ),
        "softmax_numerators": (numerators.softmax_numerators, logits),
        "chunk_sums": (lambda **a: numerators.chunk_sums(**a, size=16), logits),
        "read_all": (lambda **a: read_all(load(), **a), {"x": torch.ones(2048, dtype=torch.int32)}),
    }


FAULTS = {
    "dtype": lambda x: x.to(torch.float64 if x.is_floating_point() else torch.int16),
    "elements apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "more dimensions": lambda x: x[None],
    "device": lambda x: x.to("meta"),
}
# What is longer by one in its last dimension does not fit the other arguments. These alone may have
# any length; a weight, as long as a sum takes one input at a time.
ANY_LENGTH = {"embedding ids", "softmax_numerators logits", "chunk_sums logits"}
ANY_WIDTH = {"pack weight", "embedding weight"}


def longer_fits(name: str, argument: str, dtype) -> bool:
    which = f"{name} {argument}"
    one = Functions(load(), dtype).inputs_together <= 1
    return which in ANY_LENGTH or (which in ANY_WIDTH and one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases(torch.float32))
def test_what_fits_is_taken_and_what_does_not_is_refused(name, dtype):
    call, arguments = cases(dtype)[name]
    call(**arguments)
    for argument, x in arguments.items():
        faults = dict(FAULTS)
        if not longer_fits(name, argument, dtype):
            faults["longer"] = lambda x: torch.cat([x, x[..., :1]], -1)
        for fault, make in faults.items():
            wrong = {**arguments, argument: make(x)}
            with pytest.raises(ValueError) as error:
                call(**wrong)
                pytest.fail(f"{name} took {argument} with another {fault}")
            assert "must be" in str(error.value) or fault == "longer", (argument, fault)


def test_the_words_of_a_refusal():
    f = Functions(load(), torch.float32)
    with pytest.raises(ValueError) as error:
        f.add_norm(torch.zeros(2, 4), None, torch.zeros(8)[::2], 1e-5)
    assert str(error.value) == (
        "weight must be torch.float32 (4,), contiguous, on cpu; it is torch.float32 (4,), "
        "strides (2,), on cpu"
    )
    with pytest.raises(ValueError, match=r"q must be \(T, H, E\); it is \(2, 4\)"):
        f.attend(torch.zeros(2, 4), *cache(torch.float32).values(), SPANS, TABLES, True)


@pytest.mark.parametrize(
    "spans, tables",
    [(array("i", [0] * 4), TABLES), (array("q", [0] * 5), TABLES), (SPANS, array("q", [0, 3]))],
)
def test_spans_of_another_form_are_refused(spans, tables):
    f, q = Functions(load(), torch.float32), normal(T, H, E)
    with pytest.raises(ValueError, match="spans must be 4 int64"):
        f.attend(q, *cache(torch.float32).values(), spans, tables, True)


def test_sizes_that_do_not_go_together_are_refused():
    f = Functions(load(), torch.float32)
    with pytest.raises(ValueError, match="15 slots"):
        f.attend(normal(T, H, E), *torch.zeros(2, N, K, 15, E), SPANS, TABLES, True)
    with pytest.raises(ValueError, match="not a multiple of 3"):
        f.attend(normal(T, 4, E), *torch.zeros(2, N, 3, S, E), SPANS, TABLES, True)
    with pytest.raises(ValueError, match="3 chunks"):
        f.product(normal(T, D), normal(64, D), 64, 3)
    with pytest.raises(ValueError, match="not in torch.float16"):
        Functions(load(), torch.float16)
    tensors = LayerTensors(**layer_tensors(torch.float32))
    with pytest.raises(ValueError, match="base=None"):  # two ranks and no memory to share
        Layers(f, [tensors], LayerSizes(H, K, E, F, 1e-5), Place(None, 2, 0, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_apart(dtype):
    """Parts of qkv are rotated, attended with and written where they lie."""
    f = Functions(load(), dtype)
    qkv, angles = normal(T, H + 2 * K, E, dtype=dtype), normal(T, 1, E // 2)
    q, k, v = qkv.split([H, K, K], 1)
    apart, together = cache(dtype), cache(dtype)
    blocks, offsets = ints(0, 0, 3), ints(0, 1, 7)
    copied = q.contiguous()
    for x in (q, copied):
        f.rotate(x, angles.cos(), angles.sin())
    assert torch.equal(q, copied)
    f.write_kv(k, v, blocks, offsets, *apart.values())
    f.write_kv(k.contiguous(), v.contiguous(), blocks, offsets, *together.values())
    assert torch.equal(apart["k_cache"], together["k_cache"]) and apart["k_cache"].any()
    assert torch.equal(apart["v_cache"], together["v_cache"])
    assert sorted(apart["v_cache"][3].flatten().tolist())[-1] == max(0, v[2].max())
    ours, theirs = (f.attend(x, *apart.values(), SPANS, TABLES, True) for x in (q, q.contiguous()))
    assert torch.equal(ours, theirs) and ours.any()
    for stride in (0, E):  # rows that overlap
        with pytest.raises(ValueError, match="contiguous rows"):
            require_rows("q", q.as_strided((T, H, E), (stride, E, 1)), dtype, T, H, E)
    require_rows("x", torch.zeros(1, 4).as_strided((1, 4), (0, 1)), torch.float32, 1, 4)


def test_layers_check_a_cache_once(monkeypatch):
    """One that comes again is known, and another one is looked at."""
    dtype = torch.float32
    runner, looked = layers(dtype, **layer_tensors(dtype)), []
    take = runner._take_cache
    monkeypatch.setattr(runner, "_take_cache", lambda cache: (looked.append(cache), take(cache)))
    step = runner.step(
        T,
        *torch.ones(2, T, 1, E // 2),
        ints(0, 0, 3),
        ints(0, 1, 7),
        SPANS,
        TABLES,
        True,
    )
    first, second = [tuple(cache(dtype).values())], [tuple(cache(dtype).values())]
    out = [runner(normal(T, D), step, each) for each in (first, first, second)]
    assert looked == [first, second]
    assert all(torch.equal(each, out[0]) for each in out) and torch.equal(first[0][0], second[0][0])
    with pytest.raises(ValueError, match="2 layers, not 1"):
        runner(normal(T, D), step, first * 2)


def test_shared_memory_refuses_what_it_cannot_take():
    shared, x = SharedMemory(load()), torch.zeros(4, 4)
    place = Place(
        torch.zeros(load().shared_bytes(1) + 128, dtype=torch.uint8).data_ptr(), 1, 0, 1.0
    )
    for call in (
        shared.sum,
        shared.broadcast,
        lambda p, x: shared.gather(p, x, torch.zeros(1, 4, 4)),
    ):
        for wrong in (x.t()[:, :3], x.to("meta")):
            with pytest.raises(ValueError, match="x must be"):
                call(place, wrong)
    with pytest.raises(ValueError, match="float64"):
        shared.sum(place, x.double())
    with pytest.raises(ValueError, match="out must be"):
        shared.gather(place, x, torch.zeros(2, 4, 4))


def test_a_check_takes_microseconds():
    """A layer has 12 us in all. Generous: the machine may be busy."""
    x, best = torch.zeros(4, 8), 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            require("x", x, torch.float32, 4, 8)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 5e-6, f"{best * 1e6:.2f} us"
