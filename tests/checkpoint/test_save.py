"""The writers: complete or absent, and refusing what cannot be stored. (What they write is checked
in test_oracles.)"""

import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from llama_tp.arch.config import RopeScaling
from llama_tp.arch.errors import UserError
from llama_tp.checkpoint import save as room
from llama_tp.checkpoint.save import save_hf, save_meta
from llama_tp.checkpoint.source import open_checkpoint
from tests.checkpoint.make import GQA, RAGGED, random_weights
from tests.checkpoint.test_load import assert_all_ranks

torch.set_num_threads(1)


def test_the_config_survives_both_layouts(tmp_path):
    for i, c in enumerate(
        (GQA, RAGGED, replace(GQA, rope_scaling=RopeScaling(32.0), max_context=131072, tied=True))
    ):
        weights = random_weights(c)
        save_meta(tmp_path / f"m{i}", c, weights, 2)
        save_hf(tmp_path / f"h{i}", c, weights, 2)
        assert (
            open_checkpoint(tmp_path / f"m{i}").config
            == c
            == open_checkpoint(tmp_path / f"h{i}").config
        )


def test_more_shards_than_kv_heads_store_each_head_several_times(tmp_path):
    weights = random_weights(GQA)
    save_meta(tmp_path / "m", GQA, weights, 16)
    source = open_checkpoint(tmp_path / "m")
    assert source.config.kv_repeat == 2
    assert_all_ranks(source, GQA, weights, (1, 16))


def test_a_tied_head_takes_no_room(tmp_path):
    c = replace(GQA, tied=True)
    weights = random_weights(c)
    save_meta(tmp_path / "m", c, weights, 1)
    size = (tmp_path / "m" / "consolidated.00.pth").stat().st_size
    assert size < sum(w.nbytes for name, w in weights.items() if name != "output.weight") + 20_000
    assert "output.weight" in torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)


def test_failing_half_way_leaves_nothing(tmp_path, monkeypatch):
    n = []

    def full(*args, **kwargs):
        n.append(1)
        if len(n) == 2:
            raise OSError(28, "No space left on device")
        return really(*args, **kwargs)

    really = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save_meta(tmp_path / "m", GQA, random_weights(GQA), 4)
    assert os.listdir(tmp_path) == []


def test_while_it_is_written_the_folder_does_not_exist_and_the_config_comes_last(
    tmp_path, monkeypatch
):
    seen = []

    def watch(path, what):
        seen.append(
            (
                os.path.basename(path),
                (tmp_path / "h").exists(),
                sorted(os.listdir(os.path.dirname(path))),
            )
        )
        return really(path, what)

    really = room._write_json
    monkeypatch.setattr(room, "_write_json", watch)
    save_hf(tmp_path / "h", GQA, random_weights(GQA))
    assert seen == [("config.json", False, ["model.safetensors"])]
    assert os.listdir(tmp_path) == ["h"]


def test_what_cannot_be_saved_is_refused(tmp_path, monkeypatch):
    weights = random_weights(GQA)
    with pytest.raises(UserError, match=r"wq|wk|tok_embeddings.*3 equal shards"):
        save_meta(tmp_path / "m", GQA, weights, 3)
    with pytest.raises(
        UserError, match=r"layers.0.attention.wq.weight cannot be saved - found nothing"
    ):
        save_hf(
            tmp_path / "m", GQA, {k: w for k, w in weights.items() if "0.attention.wq" not in k}
        )
    with pytest.raises(
        UserError, match="params.json cannot say this RoPE scaling.*original_context=4096"
    ):
        save_meta(
            tmp_path / "m",
            replace(GQA, rope_scaling=RopeScaling(8.0, original_context=4096)),
            weights,
        )
    with pytest.raises(UserError, match="fewer files"):
        save_hf(tmp_path / "m", GQA, weights, 1000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(UserError, match="no room.*1 free"):
        save_hf(tmp_path / "m", GQA, weights)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    (tmp_path / "m").mkdir()
    save_hf(tmp_path / "m", GQA, weights)  # an empty folder is as good as none
    with pytest.raises(UserError, match="not an empty folder"):
        save_hf(tmp_path / "m", GQA, weights)
