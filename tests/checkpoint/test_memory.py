"""What a load costs: bytes read from files, and the peak memory of a rank, measured in a process of
its own.

The peak is VmHWM of /proc/self/status, where mapped file pages count; bytes read are `rchar` of
/proc/self/io.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llama_tp.arch.config import ModelConfig
from llama_tp.checkpoint.save import save_hf, save_meta
from llama_tp.checkpoint.source import open_checkpoint
from tests.checkpoint.make import GQA, shapes

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/io"), reason="needs Linux's /proc/self/io"
)

# Loads one rank's tensors into plain memory. rchar is read after the imports, so that it counts the
# checkpoint alone.
CHILD = """
import json, sys
import torch
from llama_tp.arch.shard_map import ShardMap
from llama_tp.checkpoint.load import load
from llama_tp.checkpoint.source import open_checkpoint

def number(path, key):
    return next(int(line.split()[1]) for line in open(path) if line.startswith(key))

torch.set_num_threads(1)
folder, rank, tp = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
before = number("/proc/self/io", "rchar:")
source = open_checkpoint(folder)
opened = number("/proc/self/io", "rchar:")
shard = ShardMap.even(source.config, tp).shard(rank)
held = []
def into(weight, tensor):
    held.append(torch.empty(tensor.local_shape(weight, shard), dtype=source.dtype))
    return held[-1]
for weight in load(source, shard, into):
    pass
read = number("/proc/self/io", "rchar:")
print(json.dumps({"opening": opened - before, "read": read - opened, "share": source.rank_bytes(shard),
                  "resident": sum(t.nbytes for t in held), "peak": 1024 * number("/proc/self/status", "VmHWM:")}))
"""  # noqa: E501


def measured(folder, rank, tp) -> dict:
    command = [sys.executable, "-c", CHILD, str(folder), str(rank), str(tp)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    return json.loads(done.stdout)


def random_weights(c: ModelConfig) -> dict[str, torch.Tensor]:
    """Rows of one random block, rolled: as good as random for a memory test, and quick."""
    block = torch.randn(1 << 20).to(torch.bfloat16)
    found = {}
    for i, (name, shape) in enumerate(shapes(c).items()):
        n = torch.Size(shape).numel()
        found[name] = block.roll(i).repeat(-(-n // len(block)))[:n].view(shape)
    return found


def test_a_rank_reads_its_share_and_opening_reads_headers(tmp_path):
    """2 MB layers, so that headers (some kB) and what tells tied embeddings and copied heads hardly
    count."""
    c = replace(GQA, dim=512, head_dim=32, ffn_dim=1536, vocab_size=1024)
    weights = random_weights(c)
    save_meta(tmp_path / "m", c, weights, 2)
    save_hf(tmp_path / "h", c, weights)
    for folder in (tmp_path / "m", tmp_path / "h"):
        total = open_checkpoint(folder).n_bytes
        whole, half = measured(folder, 0, 1), measured(folder, 1, 2)
        assert whole["share"] == total == whole["resident"]
        assert whole["read"] < 1.05 * total
        # Embeddings of 1 MB are compared band by band (16 MB) to see whether they are tied: twice 1
        # MB here.
        assert whole["opening"] < 2.2e6 + 100_000
        assert half["share"] == half["resident"] < 0.51 * total
        # In one file column cuts narrower than a page bring their whole rows: wo and w2, which are
        # a fifth of it here.
        columns = 0.2 * total if folder.name == "h" else 0
        assert half["read"] < 1.05 * half["share"] + columns


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_peak_memory_of_a_rank(tmp_path, layout):
    """The proportions of the 1B in 1.2 GB: peak < 1.25 x resident weights + 500 MB; importing torch
    is half of that."""
    c = ModelConfig(
        dim=2048, n_layers=8, n_heads=32, n_kv_heads=8, head_dim=64, ffn_dim=8192, vocab_size=32768
    )
    folder = tmp_path / "big"
    save = {"meta": save_meta, "hf": save_hf}[layout]
    save(folder, c, random_weights(c), 2)
    for rank, tp in ((0, 1), (1, 2)):
        found = measured(folder, rank, tp)
        print(
            layout, f"rank {rank} of {tp}", {key: f"{n / 1e6:.0f} MB" for key, n in found.items()}
        )
        assert found["resident"] > 1.0e9 / tp
        assert found["peak"] < 1.25 * found["resident"] + 500e6
        # HF, tp 2: the columns of wo are 2 kB wide, less than a page, so its whole rows are read
        # (33 of 621 MB).
        assert found["read"] < 1.06 * found["share"]
