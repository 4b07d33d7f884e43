"""`org/name` to a folder, through huggingface_hub (the extra `[hf]`). The only module that may
touch the network."""

import os
import re

from llama_tp.arch.errors import UserError
from llama_tp.arch.json_file import key_name

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HF_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "original/tokenizer.model"]
# for models published without safetensors
_META_FILES = ["*.json", "*.jinja", "tokenizer.model", "original/*"]


def is_repo(path: str) -> bool:
    """Whether `path` can only mean a model on the hub: it looks like org/name, and there is no such
    folder here. Nor one called
    org: then it is a folder's misspelt name, and asking the hub would take half a minute where
        there is no network."""
    return (
        _REPO.fullmatch(path) is not None
        and not os.path.lexists(path)
        and not os.path.isdir(path.partition("/")[0])
    )


def fetch(path: str, cached_only: bool = False) -> str:
    """The local folder of a checkpoint: `path` itself unless it names a model on the hub, which
    then is downloaded.

    Of the ranks of a node only one should call this; the others find the files in the cache
    afterwards (`cached_only`: no network). Raises UserError without the extra, the network or the
    right to download.
    """
    if not is_repo(path):
        return path
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{key_name(path)} is no folder here, and a download from the hub needs "
            "huggingface_hub",
            "it is not installed",
            "pip install 'llama_tp[hf]', or give --ckpt_dir a folder",
        ) from error
    try:
        if cached_only:
            return huggingface_hub.snapshot_download(path, local_files_only=True)
        names = huggingface_hub.HfApi().list_repo_files(path)
        wanted = _HF_FILES if any(name.endswith(".safetensors") for name in names) else _META_FILES
        return huggingface_hub.snapshot_download(path, allow_patterns=wanted)
    # the hub's errors, the HTTP library's and the disk's have no base class of their own
    except Exception as error:
        raise UserError(
            f"{key_name(path)} is no folder here and did not come from the hub",
            f"{type(error).__name__}: {str(error)[:200]}",
            "check the name and the network, accept the model's licence and set HF_TOKEN",
        ) from error
