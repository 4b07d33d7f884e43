"""What the server that tests fork processes from imports once (tests/ranks.py): all that is slow to
import, and nothing that keeps state or starts threads."""

import numpy  # noqa: F401
import pytest  # noqa: F401
import torch.distributed  # noqa: F401

import llama_tp.engine.build
import llama_tp.protocol.order  # noqa: F401
