"""torch's paged FlashAttention: the calls that it refuses or answers wrongly, and that ours are
none of them."""

import inspect

import pytest
import torch
from torch.nn.attention import varlen

from llama_tp.backends import select
from llama_tp.backends.attention import flash
from llama_tp.backends.attention.flash import ARGUMENTS, FlashAttention, PagedPlan, try_flash
from llama_tp.backends.attention.tiles import TileAttention, plan
from llama_tp.backends.base import LayerShape, Peers, Span
from llama_tp.model.llama import TorchElementwise
from tests.flash import Varlen, varlen_of_2_11

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
S, K, E = 256, 2, 16
USED = (5, 300, 700)
TABLE = [[0, 9, 9], [1, 2, 9], [3, 4, 5]]  # 9: a block of zeros


def shape(n_heads: int, head_dim: int) -> LayerShape:
    return LayerShape(32, n_heads, K, head_dim, 8, 1e-5, 1, 1)


def of_decodes(H: int, dtype=torch.bfloat16, n_padding: int = 0):
    """-> queries, keys, values, plan of one row for each of USED, and `n_padding` rows of no
    sequence."""
    generator = torch.Generator().manual_seed(H)
    shapes = (3 + n_padding, H, E), (10, K, S, E), (10, K, S, E)
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    k[9] = v[9] = 0
    used = torch.tensor(USED, dtype=torch.int32)
    return (
        q,
        k,
        v,
        PagedPlan(
            torch.tensor(TABLE, dtype=torch.int32), used, torch.arange(4, dtype=torch.int32), 1
        ),
    )


def expected(q, k, v, ns=(1, 1, 1)):
    spans, row = [], 0
    for used, n, blocks in zip(USED, ns, TABLE):
        spans.append(Span(row, used - n, n, blocks))
        row += n
    return plan(spans, q.shape[1], S, 9, CPU).attend(q, k, v)


def call(function, q, k, v, given: PagedPlan, **changed):
    keys = {"cu_seq_k": given.key_ends, "window_size": (-1, -1), "num_splits": None} | changed
    return function(
        q,
        k.transpose(1, 2),
        v.transpose(1, 2),
        given.ends,
        keys.pop("cu_seq_k"),
        given.max_n,
        3 * S,
        enable_gqa=True,
        seqused_k=given.used,
        block_table=given.table,
        **keys,
    )


@pytest.mark.parametrize(
    "version, changed, message",
    [
        ("2.12", {"cu_seq_k": None}, "both set or both not set"),
        ("2.13", {"cu_seq_k": None}, "both set or both not set"),
        ("2.13", {"window_size": (-1, 0)}, "194167"),
        ("2.12", {"num_splits": 1}, "requires FA3"),
    ],
)
def test_the_stand_in_refuses_the_calls_that_were_made_before(version, changed, message):
    with pytest.raises(RuntimeError, match=message):
        call(Varlen(version), *of_decodes(4), **changed)


@pytest.mark.parametrize(
    "n_padding, H", [(1, 4), (0, K)], ids=["a row too many", "heads not grouped"]
)
def test_the_stand_in_refuses_decodes_without_splits_where_torch_would_not_group_them(n_padding, H):
    with pytest.raises(RuntimeError, match="invalid for input of size|194167"):
        call(Varlen("2.13"), *of_decodes(H, n_padding=n_padding))


def test_the_silent_error_is_what_the_issue_shows():
    """pytorch #194167: with an output prefilled with NaN, the rows of sequences after the first
    stay NaN."""
    out = call(Varlen("2.13", silent=True), *of_decodes(4), window_size=(-1, 0))
    assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("fixed_bits", [False, True])
@pytest.mark.parametrize("version", ["2.12", "2.13"])
@pytest.mark.parametrize("H", [K, 3 * K])
def test_every_call_of_ours_is_taken_and_right(version, H, fixed_bits):
    function = Varlen(version)
    paged = try_flash(function, shape(H, E), torch.bfloat16, CPU, fixed_bits)
    assert isinstance(paged, FlashAttention) and paged.one_pass == (
        None if version == "2.12" else 1
    )
    for n_padding in (0, 2):
        q, k, v, decodes = of_decodes(H, n_padding=n_padding)
        out = paged.paged(q, k, v, decodes)
        torch.testing.assert_close(out, expected(q, k, v), rtol=2e-2, atol=2e-2)
    ns = (5, 1, 130)
    q, k, v, _ = of_decodes(H, n_padding=sum(ns) - 3)
    ends = torch.tensor([0, 5, 6, 136], dtype=torch.int32)
    chunks = PagedPlan(decodes.table, decodes.used, ends, 130)
    torch.testing.assert_close(
        paged.paged(q, k, v, chunks), expected(q, k, v, ns), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize(
    "version, fixed_bits, decode, chunk",
    [
        ("2.13", False, ((-1, -1), None), ((-1, 0), 1)),
        ("2.13", True, ((-1, -1), 1), ((-1, 0), 1)),
        ("2.12", False, ((-1, -1), None), ((-1, 0), None)),
        ("2.12", True, ((-1, 0), None), ((-1, 0), None)),
    ],
)
def test_only_decodes_of_grouped_heads_are_split_and_none_with_fixed_bits(
    version, fixed_bits, decode, chunk
):
    function = Varlen(version)
    paged = try_flash(function, shape(4, E), torch.bfloat16, CPU, fixed_bits)
    function.calls.clear()
    q, k, v, decodes = of_decodes(4)
    paged.paged(q, k, v, decodes)
    paged.paged(
        q,
        k,
        v,
        PagedPlan(decodes.table[2:], decodes.used[2:], torch.tensor([0, 3], dtype=torch.int32), 3),
    )
    assert function.calls == [(1, *decode), (3, *chunk)]


@pytest.mark.parametrize(
    "function, heads, why",
    [
        (varlen_of_2_11, shape(4, E), "has no block_table, enable_gqa, num_splits, seqused_k"),
        (Varlen("2.13"), shape(4, 4), "heads 4 wide"),
        (Varlen("2.13"), shape(4, 264), "heads 264 wide"),
        (Varlen("2.12", dtypes=()), shape(4, E), "FlashAttention only support"),
        (
            lambda *args, **named: Varlen("2.13", silent=True)(
                *args, **named | {"num_splits": None}
            ),
            shape(4, E),
            "off by nan",
        ),
    ],
    ids=["2.11", "narrow", "wide", "refuses", "wrong"],
)
def test_what_cannot_be_used_says_why(function, heads, why):
    if not hasattr(function, "calls") and function is not varlen_of_2_11:
        function.__signature__ = inspect.signature(Varlen("2.13"))
    assert why in try_flash(function, heads, torch.bfloat16, CPU, False)


def test_the_installed_torch_takes_our_calls():
    """Its Python layer and its shapes, on the meta device; what lies below runs on GPUs only."""
    missing = ARGUMENTS - inspect.signature(varlen.varlen_attn).parameters.keys()
    if missing:
        assert "has no" in try_flash(varlen.varlen_attn, shape(4, E), torch.bfloat16, CPU, False)
        return
    q, k, v, decodes = of_decodes(4)
    on_meta = PagedPlan(
        *(each.to("meta") for each in (decodes.table, decodes.used, decodes.ends)), 1
    )
    given = shape(4, E), torch.bfloat16, torch.device("meta")
    for paged in (
        FlashAttention(varlen.varlen_attn, 1, False, *given),
        FlashAttention(varlen.varlen_attn, None, True, *given),
    ):
        assert paged.paged(q.to("meta"), k.to("meta"), v.to("meta"), on_meta).shape == q.shape


FOUND = FlashAttention(Varlen("2.13"), 1, False, shape(4, E), torch.bfloat16, CUDA)


@pytest.mark.parametrize(
    "capability, dtype, found, failed, why",
    [
        ((9, 0), torch.bfloat16, FOUND, [], None),
        ((9, 0), torch.bfloat16, FOUND, [1], "rank 1 cannot use it"),
        ((7, 5), torch.bfloat16, None, [0], "7.5"),
        ((9, 0), torch.float32, None, [0], "float32"),
        ((9, 0), torch.bfloat16, "its varlen_attn has no block_table", [0], "no block_table"),
    ],
)
def test_it_is_chosen_where_all_ranks_have_it_and_else_the_reason_is_kept(
    monkeypatch, capability, dtype, found, failed, why
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(flash, "try_flash", lambda *args: found)
    told = []
    peers = Peers(0, 2, lambda mine: told.append(mine) or failed, None, lambda n: None)
    plain = TorchElementwise()
    chosen = select.select(CUDA, dtype, shape(4, E), False, plain, peers)
    assert type(chosen.attention) is (TileAttention if why else FlashAttention)
    assert chosen.block_size == (16 if why else 256) and told == [0 in failed]
    assert [why in said for said in chosen.not_taken] == ([True] if why else [])
