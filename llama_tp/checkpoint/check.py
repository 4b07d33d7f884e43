"""Whether the tensors in the files are exactly those of the config: names, shapes, dtypes. From
headers alone."""

import os

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.errors import UserError
from llama_tp.arch.json_file import key_name
from llama_tp.arch.regular_file import AGAIN
from llama_tp.arch.weight_format import FormatOf, FormatTensor
from llama_tp.arch.weights import HARMLESS_HF_SUFFIX, HARMLESS_META, Cut, Weight, table
from llama_tp.checkpoint.stored import DTYPES, ShardFile, Stored

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def key_of(weight: Weight, layout: str, suffix: str = "weight") -> str:
    """The name of one of the weight's tensors in files of this layout ("meta" or "hf")."""
    name = weight.hf_name if layout == "hf" else weight.name
    return name.removesuffix("weight") + suffix


def check(
    config: ModelConfig, layout: str, shards: tuple[ShardFile, ...], format_of: FormatOf
) -> None:
    """Raises UserError, with the first five cases and their count, unless every shard holds each
    tensor of each weight of the table in a shape that fits its cut and in a dtype of its format,
    and nothing else (old rotary tables are forgiven)."""
    weights = {
        key_of(weight, layout, tensor.suffix): (weight, tensor)
        for weight in table(config)
        for tensor in format_of(weight).tensors(weight)
    }
    missing, unexpected, misshapen, unreadable = [], [], [], []
    for shard in shards:
        strange = [
            key
            for key, stored in shard.tensors.items()
            if key in weights and _DTYPE_NAMES.get(stored.dtype) not in weights[key][1].dtypes
        ]
        if strange:
            first = shard.tensors[strange[0]]
            raise UserError(
                f"{first.path}: {_first(strange)} stored as "
                f"{str(first.dtype).removeprefix('torch.')}",
                "llama_tp runs weights in bf16, fp16 and fp32",
                "use the bf16 checkpoint of this model",
            )
        missing += [f"{key} ({shard.path})" for key in weights if key not in shard.tensors]
        unexpected += [
            f"{key_name(key)} ({stored.path})"
            for key, stored in shard.tensors.items()
            if key not in weights and not _harmless(key, layout)
        ]
        for key in weights.keys() & shard.tensors.keys():
            stored, allowed = (
                shard.tensors[key],
                _allowed_shapes(*weights[key], shards, shards[0].tensors.get(key)),
            )
            if stored.shape not in allowed:
                wanted = " or ".join(str(list(shape)) for shape in allowed) or "divisible"
                misshapen.append(f"{key} is {list(stored.shape)}, not {wanted} ({stored.path})")
            elif not stored.readable():
                unreadable.append(f"{key} ({stored.path})")
    parts = f"{len(shards)} shard{'s' * (len(shards) > 1)}"
    folder = shards[0].path if os.path.isdir(shards[0].path) else os.path.dirname(shards[0].path)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the model's weights are missing",
            _first(missing),
            f"the config does not belong to these files, or a file is incomplete: {AGAIN}",
        )
    if unexpected:
        raise UserError(
            f"{folder}: {len(unexpected)} tensors are none of this model's weights",
            _first(unexpected),
            "use a plain bf16 text checkpoint (no biases, adaptors, scales or vision) and its own "
            "config",
        )
    if misshapen:
        raise UserError(
            f"{folder}: {len(misshapen)} weights have other shapes than the config and {parts} "
            "give",
            _first(sorted(misshapen)),
            f"files of two models may be mixed here: {AGAIN}",
        )
    if unreadable:
        raise UserError(
            f"{folder}: {len(unreadable)} weights are scattered views",
            _first(sorted(unreadable)),
            "save them again with .contiguous()",
        )


def _first(cases: list[str]) -> str:
    return ", ".join(cases[:5]) + (f", ... ({len(cases)} in all)" if len(cases) > 5 else "")


def _harmless(key: str, layout: str) -> bool:
    return key in HARMLESS_META if layout == "meta" else key.endswith(HARMLESS_HF_SUFFIX)


def _allowed_shapes(
    weight: Weight, tensor: FormatTensor, shards: tuple[ShardFile, ...], first: Stored | None
) -> list[tuple[int, ...]]:
    """Shapes that one of the shards may give a weight. Only the embedding's cut is in doubt (Llama
    3 cuts its rows, Llama 1 and 2 its columns); the first shard's settles it for all."""
    n, whole = len(shards), tensor.shape(weight)
    if n == 1 or weight.cut is Cut.WHOLE:
        return [whole]
    dims = (0, 1) if weight.name == "tok_embeddings.weight" else (weight.cut.value,)
    shapes = [
        tuple(size // n if i == dim else size for i, size in enumerate(whole))
        for dim in dims
        if whole[dim] % n == 0
    ]
    return [first.shape] if first is not None and first.shape in shapes else shapes
