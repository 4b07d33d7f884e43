"""llama_tp: tensor-parallel inference for Llama 3 checkpoints in any layout, on any number of
ranks.

The public Python API, handed on when it is first used, so that `import llama_tp` stays light (no
torch).
"""

import importlib
from typing import Any

_PUBLIC = {
    "Llama": "api",
    "Completion": "api",
    "SamplingParams": "engine.request",
    "Dialog": "text.chat_format",
    "Message": "text.chat_format",
    "UserError": "arch.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"llama_tp.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'llama_tp' has no attribute {name!r}")
