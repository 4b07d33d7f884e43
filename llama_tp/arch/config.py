"""The shape of a Llama, read from Meta's `params.json` or HF's `config.json`, and the rank counts
it allows.

Sources: meta-llama/llama-models `models/llama3/args.py` (key names, FFN width rule), transformers
`LlamaConfig` (HF names, rope spellings). Nothing is looked up by model name: the file is the truth.
"""

import os
from dataclasses import dataclass, fields, replace
from typing import Any

from llama_tp.arch.errors import UserError, short
from llama_tp.arch.json_file import D, Fields, key_name, read_json

MAX_TP = 256  # beyond any Llama's head count: bounds the search for possible degrees
# K-chunks of a row-parallel product; tp 1, 2, 4 and 8 share one summation tree
DETERMINISTIC_CHUNKS = 8

# No file may say more: far beyond every model there is (the largest has 126 layers, 128 heads, a
# width of 16,384), and small enough that the weight table and its check stay a matter of
# milliseconds.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_WIDTH = 1 << 20  # dim, head_dim and what the FFN's width is rounded to
MAX_ROWS = 1 << 26  # of the vocabulary, and of the FFN
MAX_POSITIONS = 1 << 31
LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e6  # of RoPE's frequencies

# mp16 last: it stores KV heads twice
META_FOLDERS = ("", "original", "original/mp8", "original/mp16")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling ("llama3" in HF): long wavelengths are divided by `factor`,
    middle ones blended."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the whole, unsharded model. Frozen: what a rank derives from it gets a name of its
    own.

    `kv_repeat` is 2 for Meta's 16-shard 405B, which stores each of its 8 KV heads twice;
    `n_kv_heads` is then already 8. `notes` are decisions taken while reading that the user should
    hear about.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int  # rows of the embedding; may exceed the tokenizer's
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_context: int = 8192  # positions the model was trained for
    tied: bool = False  # the head is the embedding
    kv_repeat: int = 1
    notes: tuple[str, ...] = ()

    @property
    def n_params(self) -> int:
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied else 2)
        return self.n_layers * layer + embeddings + self.dim

    def allows_tp(self, tp: int) -> bool:
        """Whole query heads on every rank, and KV heads that either divide over the ranks or are
        copied evenly."""
        if tp < 1 or self.n_heads % tp:
            return False
        return self.n_kv_heads % tp == 0 or tp % self.n_kv_heads == 0

    def possible_tp(self) -> list[int]:
        return [tp for tp in range(1, MAX_TP + 1) if self.allows_tp(tp)]

    def check_tp(self, tp: int) -> None:
        """Raises UserError naming the degrees that work when the head counts do not allow `tp`
        ranks."""
        if not self.allows_tp(tp):
            raise UserError(
                f"this model cannot be split over {tp} ranks",
                f"it has {self.n_heads} query heads and {self.n_kv_heads} KV heads",
                f"start it with one of {', '.join(map(str, self.possible_tp()))} ranks "
                "(--nproc_per_node)",
            )

    def n_chunks(self, tp: int) -> int:
        """K-chunks of a row-parallel product: 8 where tp divides 8, so that tp 1, 2, 4, 8 cut
        alike, else one a rank."""
        shared = (
            DETERMINISTIC_CHUNKS % tp == 0
            and (self.n_heads * self.head_dim) % DETERMINISTIC_CHUNKS == 0
        )
        return DETERMINISTIC_CHUNKS if shared else tp


def ffn_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's rule, with both of its truncations (llama-models `model.py::FeedForward`)."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _checked(config: ModelConfig, where: str) -> ModelConfig:
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where}: the KV heads must divide the query heads",
            f"found {config.n_heads} query heads and {config.n_kv_heads} KV heads",
            "correct the file",
        )
    if config.ffn_dim > MAX_ROWS:
        raise UserError(
            f"{where}: no FFN is so wide",
            f"ffn_dim would be {config.ffn_dim:,}",
            "correct the file",
        )
    if config.head_dim % 2:
        raise UserError(
            f"{where}: the head width must be even for rotary positions",
            f"found {config.head_dim}",
            "correct the file",
        )
    return config


# ------------------------------------------------------------------------------- Meta's params.json

# Keys that change the arithmetic in ways this engine does not do; everything else unknown is named
# in a note.
_META_REFUSED = {
    "quantization_args": "quantised weights",
    "lora_args": "LoRA adaptors",
    "vision_chunk_size": "vision",
    "vision_model": "vision",
    "moe_args": "mixture of experts",
}
_META_KNOWN = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "head_dim",
    "ffn_dim",
    "max_batch_size",
    "max_seq_len",
    "max_context",
}


def from_params(
    raw: dict[str, Any], vocab_size: int | None = None, where: str = "params.json"
) -> ModelConfig:
    """ModelConfig from Meta's params (also nested under "model").

    Args:
        raw: the parsed JSON object.
        vocab_size: embedding rows as the shards show them, for files that say -1 (Llama 2).
        where: the file's name, for messages.

    `head_dim`, `ffn_dim`, `max_context` and `rope_scaling_factor` are not Meta's; where present
    they win over inference. Raises UserError for a missing, misshapen or unsupported key.
    """
    nested = raw.get("model")
    if isinstance(nested, dict) and "dim" in nested:
        raw = nested
    for key, what in _META_REFUSED.items():
        if raw.get(key):
            raise UserError(
                f"{where} asks for {what}, which llama_tp does not run",
                f"{key} = {short(raw[key])}",
                "use the bf16 text checkpoint of this model",
            )
    if raw.get("vocab_size", -1) == -1:
        raw = {**raw, "vocab_size": vocab_size}
    params = Fields(raw, where)
    dim, n_heads = params.whole("dim", most=MAX_WIDTH), params.whole("n_heads", most=MAX_HEADS)
    width = ffn_width(
        dim,
        params.number("ffn_dim_multiplier", None, least=1e-3, most=1024),
        params.whole("multiple_of", 256, most=MAX_WIDTH),
    )
    scaling, notes = _meta_scaling(params, dim)
    unknown = sorted(set(raw) - _META_KNOWN)
    if unknown:
        some = [key_name(key) for key in unknown[:10]] + ["..."] * (len(unknown) > 10)
        notes += (f"{where}: keys without a meaning here were ignored: {', '.join(some)}",)
    return _checked(
        ModelConfig(
            dim=dim,
            n_layers=params.whole("n_layers", most=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=params.whole("n_kv_heads", n_heads, most=MAX_HEADS),
            head_dim=_head_dim(params, dim, n_heads),
            ffn_dim=params.whole("ffn_dim", width, most=MAX_ROWS),
            vocab_size=params.whole("vocab_size", most=MAX_ROWS),
            norm_eps=params.number("norm_eps", 1e-5, least=1e-30, most=1),
            rope_theta=_theta(params, 10000.0),
            rope_scaling=scaling,
            max_context=params.whole(
                "max_context", 131072 if scaling else 8192, most=MAX_POSITIONS
            ),
            notes=notes,
        ),
        where,
    )


def _head_dim(config: Fields, dim: int, n_heads: int) -> int:
    """The heads' own width, where the file says it, else their share of the model's."""
    found = config.whole("head_dim", None, most=MAX_WIDTH)
    if found is None and dim % n_heads:
        raise UserError(
            f"{config.where}: the heads must divide the model width",
            f"found a width of {dim} and {n_heads} heads",
            "correct the file",
        )
    return found or dim // n_heads


def _theta(config: Fields, default: float) -> float:
    return config.number("rope_theta", default, least=1, most=1e30)


def _factor(config: Fields, key: str, default: D) -> float | D:
    return config.number(key, default, least=LEAST_FACTOR, most=MOST_FACTOR)


def _meta_scaling(params: Fields, dim: int) -> tuple[RopeScaling | None, tuple[str, ...]]:
    """Meta's files say only *that* RoPE is scaled. The factor is 32 for 3.2 1B and 3B (dim 2048,
    3072), else 8:
    Meta's own code uses 8 for all, which is wrong for those two (llama-models issues 166 and
    241)."""
    if not params.flag("use_scaled_rope"):
        return None, ()
    factor = _factor(params, "rope_scaling_factor", None)
    if factor is not None:
        return RopeScaling(factor), ()
    factor = 32.0 if dim in (2048, 3072) else 8.0
    return RopeScaling(factor), (
        f"RoPE scaling factor {factor:g} inferred from dim {dim} ({params.where} does not say it; "
        f"--rope_factor overrides)",
    )


# --------------------------------------------------------------------------------- HF's config.json

_HF_REFUSED = {
    "quantization_config": "quantised weights",
    "compression_config": "quantised weights",
    "attention_bias": "biases in the attention",
    "mlp_bias": "biases in the feed-forward",
    "auto_map": "code from the checkpoint folder",
}


def from_hf(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig from an HF config of the Llama architecture. Raises UserError for anything that
    would be ignored
    and matters: biases, quantisation, another architecture, an unknown rope type."""
    if raw.get("model_type") != "llama":
        raise UserError(
            f"{where} is not a Llama",
            f"model_type is {short(raw.get('model_type'))}",
            "point --ckpt_dir at a Llama 3 folder",
        )
    for key, what in _HF_REFUSED.items():
        if raw.get(key):
            raise UserError(
                f"{where} asks for {what}, which llama_tp does not run",
                f"{key} = {short(raw[key])}",
                "use the plain bf16 safetensors checkpoint of this model",
            )
    config = Fields(raw, where)
    if config.text("hidden_act", "silu") != "silu":
        raise UserError(
            f"{where}: only the silu activation is a Llama's",
            f"hidden_act is {short(raw['hidden_act'])}",
            "point --ckpt_dir at a Llama 3 folder",
        )
    dim, n_heads = (
        config.whole("hidden_size", most=MAX_WIDTH),
        config.whole("num_attention_heads", most=MAX_HEADS),
    )
    max_context = config.whole("max_position_embeddings", 2048, most=MAX_POSITIONS)
    # rope_scaling wins; transformers 5 writes rope_parameters, which has rope_theta in it.
    rope = config.object(
        "rope_parameters" if raw.get("rope_scaling") in (None, {}) else "rope_scaling"
    )
    for each in (config, rope):
        if each.number("partial_rotary_factor", 1.0, least=0, most=1) != 1.0:
            raise each.wrong("partial_rotary_factor", "1: a Llama rotates the whole head")
    return _checked(
        ModelConfig(
            dim=dim,
            n_layers=config.whole("num_hidden_layers", most=MAX_LAYERS),
            n_heads=n_heads,
            n_kv_heads=config.whole("num_key_value_heads", n_heads, most=MAX_HEADS),
            head_dim=_head_dim(config, dim, n_heads),
            ffn_dim=config.whole("intermediate_size", most=MAX_ROWS),
            vocab_size=config.whole("vocab_size", most=MAX_ROWS),
            norm_eps=config.number("rms_norm_eps", 1e-6, least=1e-30, most=1),
            rope_theta=_theta(rope, _theta(config, 10000.0)),
            rope_scaling=_hf_scaling(config, rope, max_context),
            max_context=max_context,
            tied=config.flag("tie_word_embeddings"),
        ),
        where,
    )


def _hf_scaling(config: Fields, rope: Fields, max_context: int) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"{rope.where}: only the llama3 kind of RoPE scaling is supported",
            f"rope_type is {short(kind)}",
            "use a Llama 3 checkpoint",
        )
    low, high = _factor(rope, "low_freq_factor", 1.0), _factor(rope, "high_freq_factor", 4.0)
    if low >= high:
        raise UserError(
            f"{rope.where}: high_freq_factor must be above low_freq_factor",
            f"found {high:g} and {low:g}",
            "correct the file",
        )
    # A key of the config itself comes first, and the longest context last, as in transformers'
    # standardize_rope_params.
    key = "original_max_position_embeddings"
    original = rope.whole(key, max_context, most=MAX_POSITIONS)
    factor = rope.number("factor", least=LEAST_FACTOR, most=MOST_FACTOR)
    return RopeScaling(factor, low, high, config.whole(key, original, most=MAX_POSITIONS))


def folded(config: ModelConfig, repeat: int) -> ModelConfig:
    """The config of a checkpoint that stores each KV head `repeat` times in a row (Meta's 405B
    MP16), without copies."""
    n_folded = config.n_kv_heads // repeat
    note = f"each KV head is stored {repeat} times: {config.n_kv_heads} folded to {n_folded}"
    return replace(
        config,
        n_kv_heads=config.n_kv_heads // repeat,
        kv_repeat=repeat,
        notes=config.notes + (note,),
    )


def with_rope_factor(config: ModelConfig, factor: float | None) -> ModelConfig:
    """The config with the user's RoPE factor in place of the file's (None: unchanged)."""
    if factor is None:
        return config
    launch = Fields({"--rope_factor": factor}, "the launch")
    factor = launch.number("--rope_factor", least=LEAST_FACTOR, most=MOST_FACTOR)
    if config.rope_scaling is None:
        raise UserError(
            "--rope_factor has nothing to change",
            "this checkpoint does not scale its RoPE",
            "leave the flag out",
        )
    return replace(config, rope_scaling=replace(config.rope_scaling, factor=factor))


def as_params(config: ModelConfig) -> dict[str, Any]:
    """What `from_params` reads back to the same shape: the JSON that our own writer puts beside
    Meta-layout shards."""
    plain = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name not in ("rope_scaling", "kv_repeat", "notes", "tied")
    }
    scaling = config.rope_scaling
    return (
        plain
        | {"use_scaled_rope": scaling is not None}
        | ({"rope_scaling_factor": scaling.factor} if scaling else {})
    )


def check_launch(ckpt_dir: str, tp: int) -> None:
    """Refuses an impossible tp, and a config that cannot be read, from the JSON alone, before torch
    is imported: a launch of eight ranks then ends in a second. Any other thing that is wrong with
    the folder is left for `open_checkpoint` to explain, which may still use Meta's files where
    config.json is of no use."""
    failure = None
    for name in ("config.json", *(os.path.join(folder, "params.json") for folder in META_FOLDERS)):
        path = os.path.join(ckpt_dir, name)
        if not os.path.lexists(path):
            continue
        try:
            raw = read_json(path)
            config = from_hf(raw, path) if name == "config.json" else from_params(raw, 1, path)
        except UserError as error:
            failure = failure or error
            continue
        return config.check_tp(tp)
    if failure:
        raise failure
