"""Memory arithmetic: what a rank needs for weights, KV cache and workspace, known before a byte of
weights is read."""

from dataclasses import dataclass

from llama_tp.arch.errors import UserError
from llama_tp.arch.shard_map import Shard
from llama_tp.arch.weight_format import FormatOf, all_dense, held_bytes
from llama_tp.arch.weights import table

GIB = 1 << 30


def counted(n: int) -> str:
    """A number of parameters for people: 8.03 B, 3.73 M."""
    return next(
        (
            f"{n / size:.2f} {letter}"
            for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K"))
            if n >= size
        ),
        str(n),
    )


def weight_bytes(shard: Shard, itemsize: int, format_of: FormatOf = all_dense) -> int:
    """Resident weights of one rank, padding included. itemsize: of the activations' dtype."""
    return sum(held_bytes(format_of, each, shard, itemsize) for each in table(shard.config))


def kv_bytes_per_token(shard: Shard, itemsize: int) -> int:
    """Keys and values of one position on one rank. itemsize: of the cache's dtype."""
    config = shard.config
    return 2 * config.n_layers * shard.kv_heads.width * config.head_dim * itemsize


def workspace_bytes(shard: Shard, step_tokens: int, max_rows: int, max_seq_len: int) -> int:
    """Rotary tables, activations of the widest layer, logits and attention scores; fp32 sizes,
    measured generous."""
    config, kv_columns = shard.config, shard.kv_heads.width * shard.config.head_dim
    rope = max_seq_len * config.head_dim * 4
    qkv_columns = shard.query_heads.width * config.head_dim + 2 * kv_columns
    activations = step_tokens * 4 * (4 * config.dim + 4 * shard.ffn.width + 4 * qkv_columns)
    logits = max(max_rows, 64) * 4 * 3 * config.vocab_size
    attention = 3 * (128 << 20) + 4 * 2 * kv_columns * max_seq_len
    return rope + activations + logits + attention


@dataclass(frozen=True)
class Budget:
    """What one rank may use, and what it needs, in bytes."""

    free: int
    weights: int
    workspace: int
    kv_per_block: int

    @property
    def for_kv(self) -> int:
        return self.free - self.weights - self.workspace

    def n_blocks(self, wanted: int, least: int, block_size: int) -> int:
        """Blocks of the KV cache: `wanted`, or as many as fit. Raises UserError with the sum when
        fewer than `least`
        (one sequence of max_seq_len) fit."""
        fit = max(0, self.for_kv) // self.kv_per_block
        if fit < least:
            kv = least * self.kv_per_block
            need = self.weights + kv + self.workspace
            raise UserError(
                "this launch does not fit in memory",
                f"each rank needs {self.weights / GIB:.2f} GiB weights + {kv / GIB:.2f} GiB KV "
                "cache for one sequence of "
                f"{least * block_size} tokens + {self.workspace / GIB:.2f} GiB workspace = "
                f"{need / GIB:.2f} GiB, and "
                f"{self.free / GIB:.2f} GiB is free",
                "use more ranks, a smaller --max_seq_len or --max_batch_size, or a smaller --dtype",
            )
        return min(wanted, fit)
