"""Our parallel layers against fairscale's, forward, on 1, 2 and 4 real ranks; and what chunks
promise."""

import pytest
import torch
import torch.distributed as dist
from fairscale.nn import model_parallel
from fairscale.nn.model_parallel import initialize

from llama_tp.arch.shard_map import Axis
from llama_tp.backends.base import LayerShape
from llama_tp.backends.select import Backends, select, select_plain
from llama_tp.model.build import peers_of
from llama_tp.model.linear import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama_tp.model.llama import TorchElementwise
from llama_tp.parallel.collectives import gather_stack
from tests.ranks import run

IN, OUT, VOCAB = 64, 96, 80


def weights(*shape: int) -> torch.Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * shape[-1] ** -0.5
    )


def filled(layer, part: torch.Tensor):
    layer.destination(torch.device("cpu")).copy_(part)
    layer.finish()
    return layer


def backends_of(ranks, dtype: torch.dtype, plain: bool) -> Backends:
    shape = LayerShape(IN, 4, 4, IN // 4, IN, 1e-5, 8 // ranks.tp, 8 // ranks.tp)
    given = ranks.device, dtype, shape
    if plain:
        return select_plain(*given, TorchElementwise())
    return select(*given, True, TorchElementwise(), peers_of(ranks))


def both_ways(ranks, plain: bool) -> list[float]:
    """Largest relative difference to fairscale's layer, for each of ours."""
    backends = backends_of(ranks, torch.float32, plain)
    if ranks.tp == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        initialize.initialize_model_parallel(1)
    try:
        return [
            column(ranks, backends),
            row(ranks, backends, False),
            row(ranks, backends, True),
            *(embedding(ranks, backends, tied) for tied in (True, False)),
        ]
    finally:
        if ranks.tp == 1:
            initialize.destroy_model_parallel()
            dist.destroy_process_group()


def difference(ours, theirs) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def column(ranks, backends) -> float:
    whole, x = weights(OUT, IN), weights(7, IN)
    mine = whole.chunk(ranks.tp)[ranks.rank]
    theirs = model_parallel.ColumnParallelLinear(IN, OUT, bias=False, gather_output=True)
    theirs.weight.data.copy_(mine)
    ours = filled(ColumnParallelLinear(IN, OUT // ranks.tp, torch.float32, backends), mine)
    with torch.no_grad():
        return difference(torch.cat(list(gather_stack(ours(x), ranks)), dim=-1), theirs(x))


def row(ranks, backends, deterministic: bool) -> float:
    whole, x = weights(OUT, IN), weights(7, IN)
    mine, my_x = (
        whole.chunk(ranks.tp, dim=1)[ranks.rank],
        x.chunk(ranks.tp, dim=1)[ranks.rank].contiguous(),
    )
    theirs = model_parallel.RowParallelLinear(IN, OUT, bias=False, input_is_parallel=True)
    theirs.weight.data.copy_(mine)
    ours = filled(
        RowParallelLinear(
            Axis(IN, (8 // ranks.tp,) * ranks.tp),
            ranks.rank,
            OUT,
            torch.float32,
            ranks,
            backends,
            deterministic,
        ),
        mine,
    )
    with torch.no_grad():
        return difference(ours(my_x).sum_over_ranks(), theirs(my_x))


def embedding(ranks, backends, tied) -> float:
    whole, ids = weights(VOCAB, IN), torch.arange(VOCAB).flip(0)
    mine = whole.chunk(ranks.tp)[ranks.rank]
    theirs = model_parallel.VocabParallelEmbedding(VOCAB, IN)
    theirs.weight.data.copy_(mine)
    rows = Axis(VOCAB, (1,) * ranks.tp).of(ranks.rank)
    ours = filled(VocabParallelEmbedding(rows, IN, torch.float32, ranks, backends, tied), mine)
    with torch.no_grad():
        return difference(ours(ids), theirs(ids))


@pytest.mark.parametrize("plain", [True, False], ids=["torch", "the fastest"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equal_to_fairscale(tp, plain):
    for of_rank in run(tp, both_ways, plain):
        assert of_rank[3:] == [0, 0]  # a lookup is exact
        assert max(of_rank) < 1e-5


def row_bits(ranks, dtype: torch.dtype, plain: bool) -> torch.Tensor:
    whole, x = weights(OUT, IN).to(dtype), weights(33, IN).to(dtype)
    mine = whole.chunk(ranks.tp, dim=1)[ranks.rank]
    backends = backends_of(ranks, dtype, plain)
    axis = Axis(IN, (8 // ranks.tp,) * ranks.tp)
    layer = filled(RowParallelLinear(axis, ranks.rank, OUT, dtype, ranks, backends, True), mine)
    with torch.no_grad():
        return layer(x.chunk(ranks.tp, dim=1)[ranks.rank].contiguous()).sum_over_ranks()


@pytest.mark.parametrize("tp", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plain", [True, False], ids=["torch", "the fastest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_rows_have_the_bits_of_one_rank(dtype, plain, tp):
    one = run(1, row_bits, dtype, plain)[0]
    assert all(torch.equal(each, one) for each in run(tp, row_bits, dtype, plain))
