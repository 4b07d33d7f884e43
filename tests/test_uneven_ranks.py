"""A made-up deal: eight leaves of each axis on three ranks, 3 + 3 + 2. Tokens, and in deterministic
mode the bits of every logit, are those of one rank."""

import pytest
import torch

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.shard_map import Axis, ShardMap
from tests.engines import serve
from tests.ranks import run

CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=16, ffn_dim=200, vocab_size=271
)
DEAL = (3, 3, 2)
PROMPTS = [[(i * k * k + 5 * k + i) % 260 for k in range(n)] for i, n in enumerate((5, 33, 290), 1)]
REQUESTS = [
    *((f"greedy{i}", ids, {"temperature": 0.0, "max_tokens": 8}) for i, ids in enumerate(PROMPTS)),
    *(
        (f"drawn{i}", ids, {"seed": i, "max_tokens": 8, **params})
        for i, (ids, params) in enumerate(
            zip(
                PROMPTS,
                (
                    {"temperature": 1.0, "top_p": 1.0},
                    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
                    {"temperature": 0.7, "presence_penalty": 0.5},
                ),
            )
        )
    ),
]


def uneven() -> ShardMap:
    columns = CONFIG.n_heads * CONFIG.head_dim
    return ShardMap(
        CONFIG, Axis(columns, DEAL), Axis(CONFIG.ffn_dim, DEAL), Axis(CONFIG.vocab_size, DEAL)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_three_ranks_with_uneven_parts_give_the_bits_of_one(fast, dtype):
    options = {"config": CONFIG, "dtype": dtype, "deterministic": True, "fast": fast}
    tokens, logits, _ = run(1, serve, REQUESTS, **options)[0]
    uneven_tokens, uneven_logits, _ = run(3, serve, REQUESTS, shard_map=uneven(), **options)[0]
    assert uneven_tokens == tokens
    different = [key for key in logits if not torch.equal(uneven_logits[key], logits[key])]
    assert logits and not different, f"{len(different)} of {len(logits)} logits differ"


def test_tokens_are_those_of_one_rank_in_the_default_mode_too():
    from llama_tp.engine.worker import Worker

    options = {"config": CONFIG, "worker": Worker}
    tokens = run(1, serve, REQUESTS, **options)[0][0]
    assert run(3, serve, REQUESTS, shard_map=uneven(), **options)[0][0] == tokens
