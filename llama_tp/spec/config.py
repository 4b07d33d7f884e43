"""The shape of a Llama, read from Meta's `params.json` or HF's `config.json`, and the rank counts it allows.

Sources: meta-llama/llama-models `models/llama3/args.py` (key names, FFN width rule), transformers
`LlamaConfig` (HF names, rope spellings). Nothing is looked up by model name: the file is the truth.
"""

import json
import os
from dataclasses import dataclass, fields, replace

from llama_tp.spec.errors import UserError

MAX_TP = 256                    # beyond any Llama's head count: bounds the search for possible degrees
DETERMINISTIC_CHUNKS = 8        # K-chunks of a row-parallel product; tp 1, 2, 4 and 8 share one summation tree


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1 frequency scaling ("llama3" in HF): long wavelengths are divided by `factor`, middle ones blended."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the whole, unsharded model. Frozen: what a rank derives from it gets a name of its own.

    `kv_repeat` is 2 for Meta's 16-shard 405B, which stores each of its 8 KV heads twice; `n_kv_heads` is then
    already 8. `notes` are decisions taken while reading that the user should hear about.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int                             # rows of the embedding; may exceed the tokenizer's
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_context: int = 8192                     # positions the model was trained for
    tied: bool = False                          # the head is the embedding
    kv_repeat: int = 1
    notes: tuple[str, ...] = ()

    @property
    def n_params(self) -> int:
        attention = self.dim * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tied else 2)
        return self.n_layers * layer + embeddings + self.dim

    def allows_tp(self, tp: int) -> bool:
        """Whole query heads on every rank, and KV heads that either divide over the ranks or are copied evenly."""
        if tp < 1 or self.n_heads % tp:
            return False
        return self.n_kv_heads % tp == 0 or tp % self.n_kv_heads == 0

    def possible_tp(self) -> list[int]:
        return [tp for tp in range(1, MAX_TP + 1) if self.allows_tp(tp)]

    def check_tp(self, tp: int) -> None:
        """Raises UserError naming the degrees that work when the head counts do not allow `tp` ranks."""
        if not self.allows_tp(tp):
            raise UserError(
                f"this model cannot be split over {tp} ranks",
                f"it has {self.n_heads} query heads and {self.n_kv_heads} KV heads",
                f"start it with one of {', '.join(map(str, self.possible_tp()))} ranks (--nproc_per_node)",
            )

    def n_chunks(self, tp: int) -> int:
        """K-chunks of a row-parallel product: 8 where tp divides 8, so that tp 1, 2, 4, 8 cut alike, else one a rank."""
        shared = DETERMINISTIC_CHUNKS % tp == 0 and (self.n_heads * self.head_dim) % DETERMINISTIC_CHUNKS == 0
        return DETERMINISTIC_CHUNKS if shared else tp

    def local_kv_heads(self, tp: int) -> int:
        return max(1, self.n_kv_heads // tp)

    def local_ffn(self, tp: int) -> int:
        """FFN columns on each rank; the last ranks' are padded with zeros where `ffn_dim` does not divide."""
        chunks = self.n_chunks(tp)
        return -(-self.ffn_dim // chunks) * (chunks // tp)

    def local_vocab(self, tp: int) -> int:
        """Vocabulary rows on each rank; the last rank's are padded with zeros where the vocabulary does not divide."""
        return -(-self.vocab_size // tp)


def ffn_width(dim: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's rule, with both of its truncations (llama-models `model.py::FeedForward`)."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _number(raw: dict, key: str, kind: type, where: str, default=None):
    """`raw[key]` as a finite positive `kind`, or a UserError naming file and key."""
    value = raw.get(key, default)
    if value is None:
        raise UserError(f"{where} lacks the key {key!r}", f"it has {', '.join(sorted(raw)) or 'no keys'}",
                        "take the file again from where the checkpoint came from")
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    if not good or (kind is int and value != int(value)):
        raise UserError(f"{where}: {key} must be a positive {'whole number' if kind is int else 'number'}",
                        f"found {value!r}", "correct the file or download it again")
    return kind(value)


def _checked(config: ModelConfig, where: str) -> ModelConfig:
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"{where}: the KV heads must divide the query heads",
                        f"found {config.n_heads} query heads and {config.n_kv_heads} KV heads", "correct the file")
    if config.head_dim % 2:
        raise UserError(f"{where}: the head width must be even for rotary positions", f"found {config.head_dim}",
                        "correct the file")
    return config


# ---------------------------------------------------------------------------------------------- Meta's params.json

# Keys that change the arithmetic in ways this engine does not do; everything else unknown is named in a note.
_META_REFUSED = {"quantization_args": "quantised weights", "lora_args": "LoRA adaptors", "vision_chunk_size": "vision",
                 "vision_model": "vision", "moe_args": "mixture of experts"}
_META_KNOWN = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
               "rope_theta", "use_scaled_rope", "rope_scaling_factor", "head_dim", "ffn_dim", "max_batch_size", "max_seq_len",
               "max_context"}


def from_params(raw: dict, vocab_size: int | None = None, where: str = "params.json") -> ModelConfig:
    """ModelConfig from Meta's params (also nested under "model").

    Args:
        raw: the parsed JSON object.
        vocab_size: embedding rows as the shards show them, for files that say -1 (Llama 2).
        where: the file's name, for messages.

    `head_dim`, `ffn_dim`, `max_context` and `rope_scaling_factor` are not Meta's; where present they win over
    inference. Raises UserError for a missing, misshapen or unsupported key.
    """
    nested = raw.get("model")
    if isinstance(nested, dict) and "dim" in nested:
        raw = nested
    for key, what in _META_REFUSED.items():
        if raw.get(key):
            raise UserError(f"{where} asks for {what}, which llama_tp does not run", f"key {key!r}",
                            "use the bf16 text checkpoint of this model")
    dim, n_heads = _number(raw, "dim", int, where), _number(raw, "n_heads", int, where)
    if "head_dim" not in raw and dim % n_heads:
        raise UserError(f"{where}: the heads must divide the model width", f"found dim {dim} and n_heads {n_heads}",
                        "correct the file")
    if raw.get("vocab_size", -1) == -1:
        raw = {**raw, "vocab_size": vocab_size}
    multiplier = raw.get("ffn_dim_multiplier")
    ffn = raw.get("ffn_dim") or ffn_width(dim, multiplier and _number(raw, "ffn_dim_multiplier", float, where),
                                          _number(raw, "multiple_of", int, where, 256))
    scaling, notes = _meta_scaling(raw, dim, where)
    unknown = sorted(set(raw) - _META_KNOWN)
    if unknown:
        notes += (f"{where}: keys without a meaning here were ignored: {', '.join(unknown)}",)
    return _checked(ModelConfig(
        dim=dim, n_layers=_number(raw, "n_layers", int, where), n_heads=n_heads,
        n_kv_heads=_number(raw, "n_kv_heads", int, where, n_heads), head_dim=raw.get("head_dim") or dim // n_heads,
        ffn_dim=ffn, vocab_size=_number(raw, "vocab_size", int, where), norm_eps=_number(raw, "norm_eps", float, where, 1e-5),
        rope_theta=_number(raw, "rope_theta", float, where, 10000.0),
        rope_scaling=scaling, max_context=raw.get("max_context") or (131072 if scaling else 8192), notes=notes,
    ), where)


def _meta_scaling(raw: dict, dim: int, where: str) -> tuple[RopeScaling | None, tuple[str, ...]]:
    """Meta's files say only *that* RoPE is scaled. The factor is 32 for 3.2 1B and 3B (dim 2048, 3072), else 8:
    Meta's own code uses 8 for all, which is wrong for those two (llama-models issues 166 and 241)."""
    if not raw.get("use_scaled_rope"):
        return None, ()
    if "rope_scaling_factor" in raw:
        return RopeScaling(_number(raw, "rope_scaling_factor", float, where)), ()
    factor = 32.0 if dim in (2048, 3072) else 8.0
    return RopeScaling(factor), (f"RoPE scaling factor {factor:g} inferred from dim {dim} ({where} does not say it; "
                                 f"--rope_factor overrides)",)


# ------------------------------------------------------------------------------------------------ HF's config.json

_HF_REFUSED = {"quantization_config": "quantised weights", "compression_config": "quantised weights",
               "attention_bias": "biases in the attention", "mlp_bias": "biases in the feed-forward",
               "auto_map": "code from the checkpoint folder"}


def from_hf(raw: dict, where: str = "config.json") -> ModelConfig:
    """ModelConfig from an HF config of the Llama architecture. Raises UserError for anything that would be ignored
    and matters: biases, quantisation, another architecture, an unknown rope type."""
    kind = raw.get("model_type")
    if kind != "llama":
        raise UserError(f"{where} is not a Llama", f"model_type is {kind!r}", "point --ckpt_dir at a Llama 3 folder")
    for key, what in _HF_REFUSED.items():
        if raw.get(key):
            raise UserError(f"{where} asks for {what}, which llama_tp does not run", f"{key} = {str(raw[key])[:80]}",
                            "use the plain bf16 safetensors checkpoint of this model")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: only the silu activation is a Llama's", f"hidden_act is {raw['hidden_act']!r}",
                        "point --ckpt_dir at a Llama 3 folder")
    dim, n_heads = _number(raw, "hidden_size", int, where), _number(raw, "num_attention_heads", int, where)
    if raw.get("head_dim") is None and dim % n_heads:
        raise UserError(f"{where}: the heads must divide the model width",
                        f"found hidden_size {dim} and num_attention_heads {n_heads}", "correct the file")
    rope = raw.get("rope_parameters") or {}                     # transformers 5 keeps theta in here too
    scaling = raw.get("rope_scaling") or rope
    theta = _number({"rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0))}, "rope_theta", float, where)
    return _checked(ModelConfig(
        dim=dim, n_layers=_number(raw, "num_hidden_layers", int, where), n_heads=n_heads,
        n_kv_heads=_number(raw, "num_key_value_heads", int, where, n_heads),
        head_dim=_number(raw, "head_dim", int, where, dim // n_heads) if raw.get("head_dim") else dim // n_heads,
        ffn_dim=_number(raw, "intermediate_size", int, where), vocab_size=_number(raw, "vocab_size", int, where),
        norm_eps=_number(raw, "rms_norm_eps", float, where, 1e-6), rope_theta=theta, rope_scaling=_hf_scaling(scaling, where),
        max_context=_number(raw, "max_position_embeddings", int, where, 2048), tied=bool(raw.get("tie_word_embeddings")),
    ), where)


def _hf_scaling(raw: dict, where: str) -> RopeScaling | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind != "llama3":
        raise UserError(f"{where}: only the llama3 kind of RoPE scaling is supported", f"rope_type is {kind!r}",
                        "use a Llama 3 checkpoint")
    where = f"{where} rope_scaling"
    return RopeScaling(
        _number(raw, "factor", float, where), _number(raw, "low_freq_factor", float, where, 1.0),
        _number(raw, "high_freq_factor", float, where, 4.0),
        _number(raw, "original_max_position_embeddings", int, where, 8192))


def folded(config: ModelConfig, repeat: int) -> ModelConfig:
    """The config of a checkpoint that stores each KV head `repeat` times in a row (Meta's 405B MP16), without copies."""
    note = f"each KV head is stored {repeat} times: {config.n_kv_heads} folded to {config.n_kv_heads // repeat}"
    return replace(config, n_kv_heads=config.n_kv_heads // repeat, kv_repeat=repeat, notes=config.notes + (note,))


def with_rope_factor(config: ModelConfig, factor: float | None) -> ModelConfig:
    """The config with the user's RoPE factor in place of the file's (None: unchanged)."""
    if factor is None:
        return config
    if config.rope_scaling is None:
        raise UserError("--rope_factor has nothing to change", "this checkpoint does not scale its RoPE",
                        "leave the flag out")
    return replace(config, rope_scaling=replace(config.rope_scaling, factor=float(factor)))


def as_params(config: ModelConfig) -> dict:
    """What `from_params` reads back to the same shape: the JSON that our own writer puts beside Meta-layout shards."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)
             if f.name not in ("rope_scaling", "kv_repeat", "notes", "tied")}
    scaling = config.rope_scaling
    return plain | {"use_scaled_rope": scaling is not None} | ({"rope_scaling_factor": scaling.factor} if scaling else {})


def check_launch(ckpt_dir: str, tp: int) -> None:
    """Refuses an impossible tp from the JSON alone, before torch is imported: a launch of eight ranks then ends in a
    second. Anything else that is wrong with the folder is left for `open_checkpoint` to explain."""
    for name, read in (("config.json", from_hf), ("params.json", from_params), ("original/params.json", from_params)):
        try:
            with open(os.path.join(ckpt_dir, name), encoding="utf-8-sig") as f:
                config = read(json.load(f), vocab_size=1) if read is from_params else read(json.load(f))
        except (OSError, ValueError, UserError, AttributeError):
            continue
        return config.check_tp(tp)
