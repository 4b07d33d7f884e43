"""Any stored layout to any rank: bit-equal to hand-made slices of the whole (issue: resharding
oracle)."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_tp.arch.config import RopeScaling
from llama_tp.arch.errors import UserError
from llama_tp.arch.shard_map import ShardMap
from llama_tp.checkpoint.load import load
from llama_tp.checkpoint.source import _remarks, open_checkpoint
from tests.checkpoint.make import (
    GQA,
    RAGGED,
    THREES,
    expected,
    meta_shard,
    random_weights,
    write_hf,
    write_meta,
)

torch.set_num_threads(1)


def loaded(source, rank, tp, dtype=None, progress=None):
    """{name: tensor} of one rank; destinations begin as NaN, so that what is not written shows."""
    out, shard = {}, ShardMap.even(source.config, tp).shard(rank)

    def into(weight, tensor):
        shape = tensor.local_shape(weight, shard)
        out[weight.name] = torch.full(shape, float("nan"), dtype=dtype or source.dtype)
        return out[weight.name]

    order = [weight.name for weight in load(source, shard, into, progress)]
    assert order == list(out)
    return out


def assert_all_ranks(source, c, weights, degrees):
    for tp in degrees:
        for rank in range(tp):
            seen = []
            got = loaded(source, rank, tp, progress=seen.append)
            assert got.keys() == weights.keys()
            for name, whole in weights.items():
                assert torch.equal(got[name], expected(name, whole, c, rank, tp)), (name, rank, tp)
            assert sum(seen) == source.rank_bytes(ShardMap.even(source.config, tp).shard(rank))


@pytest.mark.parametrize("mp", [1, 2, 4, 8])
def test_meta_shards_to_any_degree(tmp_path, mp):
    weights = random_weights(GQA)
    source = open_checkpoint(write_meta(tmp_path, GQA, weights, mp))
    assert (source.layout, source.n_shards, source.config, source.dtype) == (
        "meta",
        mp,
        GQA,
        torch.bfloat16,
    )
    assert (
        source.n_bytes
        == sum(w.nbytes for w in weights.values())
        == source.rank_bytes(ShardMap.even(source.config, 1).shard(0))
    )
    assert_all_ranks(source, GQA, weights, (1, 2, 4, 8, 16))


@pytest.mark.parametrize("n_files, index", [(1, False), (1, True), (3, True), (3, False)])
def test_hf_files_to_any_degree(tmp_path, n_files, index):
    weights = random_weights(GQA)
    source = open_checkpoint(write_hf(tmp_path, GQA, weights, n_files, index))
    assert (source.layout, source.n_shards, source.config) == ("hf", 1, GQA)
    assert_all_ranks(source, GQA, weights, (1, 2, 4, 8, 16))


def test_vocabulary_and_ffn_that_do_not_divide_are_padded_with_zeros(tmp_path):
    weights = random_weights(RAGGED)
    for source in (
        open_checkpoint(write_meta(tmp_path / "m", RAGGED, weights, 4)),
        open_checkpoint(write_hf(tmp_path / "h", RAGGED, weights)),
    ):
        assert_all_ranks(source, RAGGED, weights, (1, 2, 8, 16))
    # 16 x 9 rows for 132, 16 x 7 columns for 100: nothing is left for it
    last = loaded(source, 15, 16)
    assert not last["output.weight"].any() and not last["layers.0.feed_forward.w2.weight"].any()


def test_three_shards_to_one_and_back(tmp_path):
    weights = random_weights(THREES)
    for source in (
        open_checkpoint(write_meta(tmp_path / "3", THREES, weights, 3)),
        open_checkpoint(write_meta(tmp_path / "1", THREES, weights, 1)),
    ):
        assert_all_ranks(source, THREES, weights, (1, 3, 6))


def test_coprime_degrees(tmp_path):
    """12 heads in 4 shards on 3 ranks: no rank's part is whole shards."""
    c = replace(GQA, n_heads=12, n_kv_heads=12, vocab_size=120)
    weights = random_weights(c)
    assert_all_ranks(
        open_checkpoint(write_meta(tmp_path, c, weights, 4)), c, weights, (1, 3, 6, 12)
    )


def test_layouts_give_equal_tensors_on_every_rank(tmp_path):
    weights = random_weights(GQA)
    sources = [
        open_checkpoint(write_meta(tmp_path / f"mp{mp}", GQA, weights, mp)) for mp in (1, 2, 8)
    ]
    sources.append(open_checkpoint(write_hf(tmp_path / "hf", GQA, weights, 2)))
    for rank in range(4):
        first, *others = [loaded(source, rank, 4) for source in sources]
        assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_embedding_cut_by_columns_as_in_llama_2(tmp_path):
    weights = random_weights(GQA)
    folder = write_meta(tmp_path, GQA, weights, 4, embedding_dim=1, vocab_size=-1)
    source = open_checkpoint(folder)
    assert source.config.vocab_size == GQA.vocab_size
    assert_all_ranks(source, GQA, weights, (1, 2, 8))


def test_vocabulary_of_minus_one_and_nested_params(tmp_path):
    weights = random_weights(GQA)
    write_meta(tmp_path, GQA, weights, 2, vocab_size=-1)
    params = tmp_path / "params.json"
    params.write_text(json.dumps({"model": json.loads(params.read_text()), "comment": "x"}))
    assert open_checkpoint(tmp_path).config.vocab_size == GQA.vocab_size


def test_byte_order_mark_crlf_and_stray_files_are_no_matter(tmp_path):
    write_meta(tmp_path, GQA, random_weights(GQA), 2)
    params = tmp_path / "params.json"
    lines = json.dumps(json.loads(params.read_text()), indent=1).splitlines()
    params.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    for stray in (
        "optimizer.pth",
        "._consolidated.00.pth",
        "consolidated.0.pth",
        "consolidated.00.pth.bak",
    ):
        (tmp_path / stray).write_bytes(b"junk")
    assert open_checkpoint(tmp_path).n_shards == 2


# ------------------------------------------------------------------- KV heads that are stored twice


def doubled(weights, c, n=2):
    """The same model with every KV head stored n times in a row."""

    def twice(whole):
        return torch.cat([head for head in whole.split(c.head_dim) for _ in range(n)])

    return {
        name: twice(w) if ".wk." in name or ".wv." in name else w for name, w in weights.items()
    }


@pytest.mark.parametrize("mp", [1, 2, 8, 16])
def test_sixteen_stored_kv_heads_fold_to_eight(tmp_path, mp):
    weights = random_weights(GQA)
    source = open_checkpoint(write_meta(tmp_path, GQA, doubled(weights, GQA), mp, n_kv_heads=16))
    assert (source.config.n_kv_heads, source.config.kv_repeat) == (8, 2)
    assert any("folded to 8" in note for note in source.notes)
    assert_all_ranks(source, GQA, weights, (1, 2, 4, 8, 16))


def test_hf_with_sixteen_stored_kv_heads(tmp_path):
    """The first HF export of the 405B (formats.md 1.4)."""
    weights = random_weights(GQA)
    source = open_checkpoint(
        write_hf(tmp_path, replace(GQA, n_kv_heads=16), doubled(weights, GQA), 2)
    )
    assert source.config.kv_repeat == 2
    assert_all_ranks(source, GQA, weights, (1, 8, 16))


def test_kv_heads_stored_four_times(tmp_path):
    c = replace(GQA, n_heads=32)
    weights = random_weights(c)
    source = open_checkpoint(write_meta(tmp_path, c, doubled(weights, c, 4), 4, n_kv_heads=32))
    assert source.config.kv_repeat == 4
    assert_all_ranks(source, c, weights, (2, 16, 32))


def test_sixteen_different_kv_heads_stay_sixteen(tmp_path):
    c = replace(GQA, n_kv_heads=16)
    weights = random_weights(c)
    alike = weights["layers.0.attention.wk.weight"]
    alike[4:8] = alike[:4]  # one equal pair is not enough
    source = open_checkpoint(write_meta(tmp_path, c, weights, 2))
    assert (source.config.n_kv_heads, source.config.kv_repeat) == (16, 1)
    assert_all_ranks(source, c, weights, (1, 16))


@pytest.mark.parametrize("name", ["layers.1.attention.wk.weight", "layers.1.attention.wv.weight"])
def test_a_layer_whose_copies_differ_is_refused_by_the_rank_that_holds_them(tmp_path, name):
    stored = doubled(random_weights(GQA), GQA)
    stored[name][13 * 4 + 1, 5] += 1  # the second copy of head 6
    source = open_checkpoint(write_meta(tmp_path, GQA, stored, 16, n_kv_heads=16))
    loaded(source, 0, 2)
    with pytest.raises(UserError, match=rf"consolidated\.13\.pth: {name} differs"):
        loaded(source, 1, 2)


# ---------------------------------------------------------------------------------- tied embeddings


def test_tied_embeddings(tmp_path):
    c = replace(GQA, tied=True)
    weights = random_weights(c)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    rest = {name: w for name, w in weights.items() if name != "output.weight"}
    separate = write_meta(tmp_path / "separate", c, weights, 1)
    shared = write_meta(tmp_path / "shared", c, weights, 2)
    for i in range(2):
        shard = meta_shard(weights, i, 2)
        shard["output.weight"] = shard["tok_embeddings.weight"]
        torch.save(shard, shared / f"consolidated.{i:02d}.pth")
    hf = write_hf(tmp_path / "hf", c, weights)
    both = write_hf(tmp_path / "both", replace(c, tied=False), weights, tie_word_embeddings=True)
    for folder in (separate, shared, hf, both):
        source = open_checkpoint(folder)
        assert source.config.tied, folder
        assert_all_ranks(source, c, rest, (1, 4))


def test_a_head_of_its_own_wins_over_a_config_that_says_tied(tmp_path):
    weights = random_weights(GQA)
    weights["output.weight"] = weights["tok_embeddings.weight"].clone()
    weights["output.weight"][-1, -1] += 1
    for folder in (
        write_meta(tmp_path / "m", GQA, weights, 1),
        write_hf(tmp_path / "h", GQA, weights, tie_word_embeddings=True),
    ):
        source = open_checkpoint(folder)
        assert not source.config.tied
        assert_all_ranks(source, GQA, weights, (2,))
    assert any("head of its own" in note for note in source.notes)


# ---------------------------------------------------------------------- dtypes, views, destinations


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_stored_dtypes_are_cast_on_the_way(tmp_path, stored):
    weights = random_weights(GQA, stored)
    for folder in (
        write_meta(tmp_path / "m", GQA, weights, 2),
        write_hf(tmp_path / "h", GQA, weights),
    ):
        source = open_checkpoint(folder)
        assert source.dtype == stored
        got = loaded(source, 1, 2, torch.bfloat16)
        for name, whole in weights.items():
            assert torch.equal(got[name], expected(name, whole.bfloat16(), GQA, 1, 2))


def test_mixed_dtypes_are_said(tmp_path):
    weights = {name: w.float() if "norm" in name else w for name, w in random_weights(GQA).items()}
    source = open_checkpoint(write_hf(tmp_path, GQA, weights))
    assert source.dtype == torch.bfloat16
    assert any("several dtypes: bfloat16, float32" in note for note in source.notes)


def test_pth_views_parameters_and_shared_storages(tmp_path):
    """Llama 1 and 2 shards are views of one storage; others save transposed views or Parameters."""
    weights = random_weights(GQA)
    big = torch.stack(
        [weights["layers.0.feed_forward.w1.weight"], weights["layers.0.feed_forward.w3.weight"]]
    )
    wide = torch.cat(
        [weights["layers.0.attention.wo.weight"], weights["layers.1.attention.wo.weight"]], dim=1
    )
    odd = dict(weights)
    odd["layers.0.feed_forward.w1.weight"], odd["layers.0.feed_forward.w3.weight"] = big[0], big[1]
    odd["layers.0.attention.wo.weight"], odd["layers.1.attention.wo.weight"] = (
        wide[:, :64],
        wide[:, 64:],
    )
    odd["layers.1.feed_forward.w2.weight"] = (
        weights["layers.1.feed_forward.w2.weight"].t().contiguous().t()
    )
    odd["layers.1.attention.wq.weight"] = torch.nn.Parameter(
        weights["layers.1.attention.wq.weight"]
    )
    odd["norm.weight"] = torch.cat([torch.zeros(8).bfloat16(), weights["norm.weight"]])[8:]
    odd["rope.freqs"] = torch.zeros(2)
    write_meta(tmp_path, GQA, weights, 1)
    torch.save(odd, tmp_path / "consolidated.00.pth")
    assert_all_ranks(open_checkpoint(tmp_path), GQA, weights, (1, 2, 8))


def test_old_rotary_tables_in_hf_are_ignored(tmp_path):
    weights = random_weights(GQA)
    write_hf(tmp_path, GQA, weights)
    file, table = (
        tmp_path / "model.safetensors",
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)},
    )
    save_file({name: w.clone() for name, w in load_file(file).items()} | table, file)
    assert_all_ranks(open_checkpoint(tmp_path), GQA, weights, (2,))


def test_destinations_may_be_strided_slices_of_a_packed_tensor(tmp_path):
    """As a fused qkv, and a weight that is kept transposed."""
    weights = random_weights(GQA)
    source = open_checkpoint(write_hf(tmp_path, GQA, weights))
    packed = torch.zeros(GQA.dim, 4 * 64, dtype=torch.float32)
    views = {}

    def into(weight, tensor):
        shape = tensor.local_shape(weight, ShardMap.even(source.config, 2).shard(1))
        if weight.name.startswith("layers.0.") and weight.name.endswith(
            ("wq.weight", "wk.weight", "w2.weight")
        ):
            i = len(views)
            if weight.name.endswith("w2.weight"):
                views[weight.name] = torch.zeros(2 * shape[0], 2 * shape[1])[::2, ::2]
            else:
                views[weight.name] = packed[:, i * 64 : i * 64 + shape[0]].t()
            return views[weight.name]
        return torch.empty(shape)

    list(load(source, ShardMap.even(source.config, 2).shard(1), into))
    for name, view in views.items():
        assert torch.equal(view, expected(name, weights[name], GQA, 1, 2).float()), name


# ------------------------------------------------------------------------ what is refused, and when


def test_an_impossible_degree_reads_nothing_and_names_the_possible_ones(tmp_path):
    source = open_checkpoint(write_meta(tmp_path, GQA, random_weights(GQA), 2))
    for shard in tmp_path.glob("*.pth"):
        shard.unlink()  # a read would fail in another way
    with pytest.raises(UserError, match=r"3 ranks.*8 KV heads.*1, 2, 4, 8, 16"):
        load(
            source,
            ShardMap.even(source.config, 3).shard(0),
            lambda *_: pytest.fail("asked for a destination"),
        )


def test_a_wrong_destination_or_rank_is_a_programming_error(tmp_path):
    source = open_checkpoint(write_meta(tmp_path, GQA, random_weights(GQA), 2))
    with pytest.raises(ValueError, match="destination"):
        list(load(source, ShardMap.even(source.config, 2).shard(0), lambda *_: torch.empty(1, 1)))
    with pytest.raises(ValueError, match="rank 2"):
        ShardMap.even(source.config, 2).shard(2)


def test_rope_factor_overrides_and_is_part_of_the_digest(tmp_path):
    folder = write_meta(tmp_path, GQA, random_weights(GQA), 1, use_scaled_rope=True)
    plain, forced = open_checkpoint(folder), open_checkpoint(folder, rope_factor=32)
    assert plain.config.rope_scaling == RopeScaling(
        8.0
    ) and forced.config.rope_scaling == RopeScaling(32.0)
    assert any("factor 8" in note for note in plain.notes)
    assert plain.digest() != forced.digest() and len(plain.digest()) == 32


def test_digest_is_equal_for_copies_and_differs_for_other_headers(tmp_path):
    weights = random_weights(GQA)
    a = open_checkpoint(write_meta(tmp_path / "a", GQA, weights, 2)).digest()
    b = open_checkpoint(write_meta(tmp_path / "elsewhere" / "b", GQA, weights, 2)).digest()
    c = open_checkpoint(write_meta(tmp_path / "c", GQA, weights, 4)).digest()
    d = open_checkpoint(write_hf(tmp_path / "d", GQA, weights)).digest()
    assert a == b and len({a, c, d}) == 3


# --------------------------------------------------------------------- several models in one folder


def test_safetensors_win_over_metas_files_and_it_is_said(tmp_path):
    write_meta(tmp_path, GQA, random_weights(GQA, seed=1), 2)
    source = open_checkpoint(write_hf(tmp_path, GQA, random_weights(GQA)))
    assert source.layout == "hf" and any("both layouts" in note for note in source.notes)


def test_incomplete_safetensors_lose_and_it_is_said(tmp_path):
    weights = random_weights(GQA)
    write_meta(tmp_path / "original", GQA, weights, 2)
    write_hf(tmp_path, GQA, weights, 3)
    assert open_checkpoint(tmp_path).layout == "hf" and not open_checkpoint(tmp_path).notes
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    source = open_checkpoint(tmp_path)
    assert source.layout == "meta" and source.folder == str(tmp_path / "original")
    assert any("model-00002-of-00003.safetensors" in note for note in source.notes)


@pytest.mark.parametrize("where", ["original", "original/mp8", "original/mp16"])
def test_metas_files_below_an_hf_folder_are_found(tmp_path, where):
    write_meta(tmp_path / where, GQA, random_weights(GQA), 2)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).folder == str(tmp_path / where)


def test_weights_of_llama_3_1_without_scaled_rope_are_remarked():
    c = replace(GQA, dim=2048, vocab_size=128256)
    assert any("does not scale RoPE" in note for note in _remarks(c, Counter(), False))
    assert not list(_remarks(replace(c, rope_scaling=RopeScaling(32.0)), Counter(), False))
