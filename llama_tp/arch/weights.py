"""THE table: one row a weight, with its name, its whole shape, how ranks cut it and what HF calls
it.

The loader, the model, the planner and the tests all read this; nobody routes a weight by substring
or regex. Cuts follow Meta's checkpoints (llama-models `checkpoint.py`): fairscale's
ColumnParallelLinear cuts dim 0 of [out, in] (ROWS), RowParallelLinear dim 1 (COLS), norms are whole
on every rank.
"""

from dataclasses import dataclass
from enum import Enum

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.shard_map import Shard


class Cut(Enum):
    ROWS = 0  # dim 0 is divided over the ranks
    COLS = 1  # dim 1 is divided over the ranks
    WHOLE = None  # every rank holds all of it


@dataclass(frozen=True)
class Part:
    """A rank's part of a weight: [start, stop) of dimension `dim`, padded with zeros up to `width`.

    `dim` is None for a whole weight (start, stop and width then are those of dim 0).
    """

    dim: int | None
    start: int
    stop: int
    width: int


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model.

    `units` is how many indivisible pieces the cut dimension has: heads for attention, rows or
    columns elsewhere. `rotary_heads` > 0 marks wq and wk, whose rows HF stores in another order
    within each head.
    """

    name: str  # Meta's, with ".weight"
    shape: tuple[int, ...]
    cut: Cut
    hf_name: str
    kind: str  # "heads", "kv_heads", "ffn", "vocab", "norm": which count divides it
    rotary_heads: int = 0

    def part(self, shard: Shard) -> Part:
        """What a rank holds of it."""
        if self.cut is Cut.WHOLE:
            return Part(None, 0, self.shape[0], self.shape[0])
        width = shard.config.head_dim
        held = {
            "heads": lambda: shard.query_heads.times(width),
            "kv_heads": lambda: shard.kv_heads.times(width),
            "ffn": lambda: shard.ffn,
            "vocab": lambda: shard.vocab,
        }[self.kind]()
        return Part(self.cut.value, held.start, held.stop, held.width)


def table(config: ModelConfig) -> list[Weight]:
    """All weights in the order in which they are loaded: embedding, layers, final norm, head (none
    when tied)."""
    D, F, V = config.dim, config.ffn_dim, config.vocab_size
    Q, K = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = [Weight("tok_embeddings.weight", (V, D), Cut.ROWS, "model.embed_tokens.weight", "vocab")]
    for i in range(config.n_layers):
        meta, hf = f"layers.{i}", f"model.layers.{i}"
        rows += [
            Weight(
                f"{meta}.attention_norm.weight",
                (D,),
                Cut.WHOLE,
                f"{hf}.input_layernorm.weight",
                "norm",
            ),
            Weight(
                f"{meta}.attention.wq.weight",
                (Q, D),
                Cut.ROWS,
                f"{hf}.self_attn.q_proj.weight",
                "heads",
                config.n_heads,
            ),
            Weight(
                f"{meta}.attention.wk.weight",
                (K, D),
                Cut.ROWS,
                f"{hf}.self_attn.k_proj.weight",
                "kv_heads",
                config.n_kv_heads,
            ),
            Weight(
                f"{meta}.attention.wv.weight",
                (K, D),
                Cut.ROWS,
                f"{hf}.self_attn.v_proj.weight",
                "kv_heads",
            ),
            Weight(
                f"{meta}.attention.wo.weight",
                (D, Q),
                Cut.COLS,
                f"{hf}.self_attn.o_proj.weight",
                "heads",
            ),
            Weight(
                f"{meta}.ffn_norm.weight",
                (D,),
                Cut.WHOLE,
                f"{hf}.post_attention_layernorm.weight",
                "norm",
            ),
            Weight(
                f"{meta}.feed_forward.w1.weight",
                (F, D),
                Cut.ROWS,
                f"{hf}.mlp.gate_proj.weight",
                "ffn",
            ),
            Weight(
                f"{meta}.feed_forward.w3.weight",
                (F, D),
                Cut.ROWS,
                f"{hf}.mlp.up_proj.weight",
                "ffn",
            ),
            Weight(
                f"{meta}.feed_forward.w2.weight",
                (D, F),
                Cut.COLS,
                f"{hf}.mlp.down_proj.weight",
                "ffn",
            ),
        ]
    rows.append(Weight("norm.weight", (D,), Cut.WHOLE, "model.norm.weight", "norm"))
    if not config.tied:
        rows.append(Weight("output.weight", (V, D), Cut.ROWS, "lm_head.weight", "vocab"))
    return rows


# Names that may be in a file and are not weights of this model: precomputed rotary tables of older
# exports.
HARMLESS_META = ("rope.freqs",)
HARMLESS_HF_SUFFIX = ".self_attn.rotary_emb.inv_freq"
