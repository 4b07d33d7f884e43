"""Tokenizer files for the tests: a tiny tokenizer.model made here, Meta's real one out of
llama-models."""

import base64
import importlib.util
import sys
import types
from pathlib import Path

import pytest

from llama_tp.text.tokenizer import open_tokenizer

# Every word becomes a token by way of its prefixes. Chosen for what streams and chats trip over:
# tokens that end within a character (three bytes of an emoji, two of a kanji), that hold several
# characters, that look like a stop string.
WORDS = [
    "the",
    " the",
    "ing",
    "hello",
    " world",
    "STOP",
    "xSTOPy",
    "user",
    "assistant",
    "\n\n",
    "    ",
    "ab",
    "abc",
    "\u00e9\u00e9",
    b"\xf0\x9f\x98",
    "\u65e5\u672c".encode()[:4],
]


@pytest.fixture(scope="session")
def tiny_lines():
    """Lines of a tokenizer.model: 256 bytes, not in byte order, then the merges."""
    tokens = [bytes([(value + 33) % 256]) for value in range(256)]
    for word in WORDS:
        data = word if isinstance(word, bytes) else word.encode()
        tokens += [data[:n] for n in range(2, len(data) + 1) if data[:n] not in tokens]
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


@pytest.fixture(scope="session")
def tiny_dir(tiny_lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tokenizer.model").write_bytes(b"\n".join(tiny_lines) + b"\n")
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_dir):
    return open_tokenizer(None, str(tiny_dir))


@pytest.fixture(scope="session")
def meta_file():
    """Meta's tokenizer.model, as llama-models ships it."""
    package = pytest.importorskip("llama_models", reason="oracle: Meta's tokenizer and chat format")
    # chat_format imports it for images, which no test has
    if importlib.util.find_spec("PIL") is None:
        sys.modules["PIL"] = types.SimpleNamespace(Image=types.SimpleNamespace(Image=object))
    return Path(package.__path__[0]) / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def meta(meta_file):
    """Our tokenizer on Meta's file."""
    return open_tokenizer(str(meta_file), str(meta_file.parent))


@pytest.fixture(scope="session")
def meta_oracle(meta_file):
    """Meta's own class on the same file."""
    from llama_models.llama3.tokenizer import Tokenizer

    return Tokenizer(meta_file)
