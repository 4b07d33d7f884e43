"""Collectives in shared memory between ranks that are threads of one process, where
ThreadSanitizer (make sanitize) sees both sides of each exchange. The ranks of
tests/parallel/test_shared_memory.py are processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llama_tp.native.calls import Place, SharedMemory
from llama_tp.native.library import load

pytestmark = pytest.mark.skipif(
    load() is None, reason="the C++ parts are not built here: python -m llama_tp.native.build"
)

CHUNK = 1 << 18  # bytes that are exchanged at once (shared.cpp)
SIZES = [1, 17, CHUNK // 4, CHUNK // 2 + 3, 70_000]


def memory(tp: int) -> tuple[torch.Tensor, int]:
    """Zeros for one channel, and the first address in them that is a multiple of 128."""
    zeros = torch.zeros(load().shared_bytes(tp) + 128, dtype=torch.uint8)
    return zeros, -(-zeros.data_ptr() // 128) * 128


def value(rank: int, i: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(n) % 7 + 10 * rank + i).to(dtype)  # sums are exact in bf16, too


def mix(place: Place) -> bool:
    """Sums, gathers and broadcasts of all sizes, one after the other."""
    shared, (_, tp, rank, _) = SharedMemory(load()), place
    for i, n in enumerate(SIZES * 4):
        for dtype in (torch.float32, torch.bfloat16):
            x = value(rank, i % 3, n, dtype)
            assert shared.sum(place, x)
            assert torch.equal(x, sum(value(r, i % 3, n, dtype) for r in range(tp)))
        x, out = value(rank, i, n, torch.int64), torch.empty(tp, n, dtype=torch.int64)
        assert shared.gather(place, x, out)
        assert torch.equal(out, torch.stack([value(r, i, n, torch.int64) for r in range(tp)]))
        assert shared.broadcast(place, x) and torch.equal(x, value(0, i, n, torch.int64))
    return True


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_that_are_threads(tp):
    kept, base = memory(tp)
    with ThreadPoolExecutor(tp) as pool:
        places = [Place(base, tp, rank, 60.0) for rank in range(tp)]
        assert list(pool.map(mix, places)) == [True] * tp
    assert kept.any()


def test_a_rank_alone_is_late():
    kept, base = memory(2)
    shared, place, x = SharedMemory(load()), Place(base, 2, 1, 0.1), torch.ones(3)
    assert not shared.sum(place, x)
    assert not shared.broadcast(place, x)
    assert kept.any()
