"""Whole checkpoints through the whole engine: MP8 at every degree, and an HF folder against
transformers."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from llama_tp.arch.config import ModelConfig, RopeScaling
from llama_tp.arch.shard_map import ShardMap
from llama_tp.arch.weights import table
from llama_tp.checkpoint.load import load
from llama_tp.checkpoint.save import save_meta
from llama_tp.checkpoint.source import open_checkpoint
from tests import reference
from tests.engines import serve
from tests.ranks import PATIENCE_S, ROOT, run, torchrun

DEMO = ROOT / "checkpoints" / "demo"
PROMPTS = [[1256, 74, 300, 9, 9, 1000], [5], list(range(700, 760))]
REQUESTS = [(str(i), ids, {"temperature": 0.0, "max_tokens": 12}) for i, ids in enumerate(PROMPTS)]
TPS = [1, 2, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (4, 8, 16))]
EIGHT = ModelConfig(
    dim=128, n_layers=2, n_heads=16, n_kv_heads=8, head_dim=8, ffn_dim=256, vocab_size=1512
)


def serve_folder(ranks, folder: str):
    """Greedy tokens of REQUESTS on every rank's own part of the checkpoint, read from disk."""
    source = open_checkpoint(folder)
    whole = {}
    for weight in table(source.config):  # rank 0 of 1 gives the whole weights ...
        whole[weight.name] = torch.empty(weight.shape)
    alone = ShardMap.even(source.config, 1).shard(0)
    for _ in load(source, alone, lambda weight, _: whole[weight.name]):
        pass
    model_parts = {}
    source = open_checkpoint(folder)
    shard = ShardMap.even(source.config, ranks.tp).shard(ranks.rank)
    for weight in load(
        source,
        shard,
        lambda w, t: model_parts.setdefault(w.name, torch.empty(t.local_shape(w, shard))),
    ):
        # ... of which this rank's part is a slice
        part = weight.part(shard)
        mine = model_parts[weight.name]
        sliced = (
            whole[weight.name]
            if part.dim is None
            else whole[weight.name].narrow(part.dim, part.start, part.stop - part.start)
        )
        assert torch.equal(mine.narrow(part.dim or 0, 0, part.stop - part.start), sliced), (
            weight.name
        )
    return serve(ranks, REQUESTS, config=source.config, weights=whole)


@pytest.fixture(scope="module")
def mp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mp8") / "model"
    weights = reference.random_weights(table(EIGHT))
    save_meta(str(folder), EIGHT, weights, mp=8)
    shutil.copy(DEMO / "tokenizer.model", folder)
    return str(folder), {
        str(i): reference.greedy(weights, EIGHT, ids, 12) for i, ids in enumerate(PROMPTS)
    }


@pytest.mark.parametrize("tp", TPS)
def test_mp8_gives_the_same_greedy_tokens_at_every_degree(mp8, tp):
    folder, expected = mp8
    tokens, _, _ = run(tp, serve_folder, folder)[0]
    assert {name: ids for (name, _), ids in tokens.items()} == expected


def test_three_ranks_are_refused_once_with_the_degrees_that_work(mp8):
    with torchrun(3, ["-m", "llama_tp.generate", "--ckpt_dir", mp8[0], "--prompt", "x"]) as job:
        assert job.wait() != 0
        [error] = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert "3 ranks" in error and "8 KV heads" in error and "1, 2, 4, 8, 16 ranks" in error


def test_three_ranks_are_refused_before_torch_is_imported(mp8):
    """The refusal is quick because it needs nothing heavy. -X importtime lists every module that is
    imported, on stderr."""
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "llama_tp.generate",
            "--ckpt_dir",
            mp8[0],
            "--prompt",
            "x",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "3"},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_S,
    )
    imported = {
        line.rsplit("|", 1)[-1].strip()
        for line in done.stderr.splitlines()
        if "import time:" in line
    }
    assert (
        done.returncode == 1
        and "error: " in done.stderr
        and "fire" in imported
        and "torch" not in imported
    )


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Tied embeddings, factor-32 RoPE, own head_dim, and of the tokenizer only a tokenizer.json."""
    transformers = pytest.importorskip("transformers", reason="the oracle is in the test extra")
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra llama_tp[hf]")
    folder = tmp_path_factory.mktemp("hf")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        ["O Romeo, Romeo! wherefore art thou Romeo?"] * 3,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|begin_of_text|>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    library.save(str(folder / "tokenizer.json"))
    config = ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=8,
        n_kv_heads=4,
        head_dim=16,
        ffn_dim=160,
        vocab_size=library.get_vocab_size(),
        rope_scaling=RopeScaling(32.0),
        tied=True,
    )
    theirs = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=16,
                vocab_size=config.vocab_size,
                tie_word_embeddings=True,
                max_position_embeddings=131072,
                bos_token_id=0,
                eos_token_id=None,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            )
        )
        .eval()
        .float()
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            # else a tied model repeats its input
            scale = 0.3 if "embed" in name else 2 * weight.shape[-1] ** -0.5
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    theirs.save_pretrained(folder)
    return folder, theirs, library


@pytest.mark.parametrize("tp", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_hf_folder_generates_what_transformers_does(hf_folder, tp):
    folder, theirs, library = hf_folder
    prompt = "wherefore art thou"
    ids = library.encode(prompt).ids  # no BOS: tokenizer.json has no template
    with torch.inference_mode():
        expected = theirs.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
    assert len(set(expected)) > 4  # a path that wanders, or equality says little
    with torchrun(
        tp,
        [
            "-m",
            "llama_tp.generate",
            "--ckpt_dir",
            str(folder),
            "--prompt",
            prompt,
            "--temperature",
            "0",
            "--max_gen_len",
            "24",
            "--json",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--ignore_eos",
        ],
    ) as job:
        assert job.wait() == 0, job.stderr
        assert json.loads(job.stdout)["tokens"] == expected
