"""Tokenizers against Meta's own class, on Meta's file and on a tiny one; and what bad files are
told."""

import json
import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.arch.errors import UserError
from llama_tp.text import meta as meta_module
from llama_tp.text.tokenizer import check_vocab, open_tokenizer
from tests.examples import examples
from tests.text.texts import SENTENCEPIECE, SHORT, SPECIAL, long_texts

# --------------------------------------------------------------------------------- Meta's real file


@pytest.mark.parametrize("name", SHORT)
def test_ids_equal_metas(name, meta, meta_oracle):
    ids = meta_oracle.encode(SHORT[name], bos=True, eos=False)
    assert meta.encode(SHORT[name], bos=True) == ids
    assert meta.decode(ids) == SHORT[name]


@pytest.mark.parametrize("name", long_texts())
def test_ids_of_a_megabyte_equal_metas(name, meta, meta_oracle):
    text = long_texts()[name]
    ids = meta.encode(text)
    assert ids == meta_oracle.encode(text, bos=False, eos=False)
    assert meta.decode(ids) == text


@settings(max_examples=examples(300), deadline=None)
@given(text=st.text())
def test_ids_of_any_text_equal_metas(text, meta, meta_oracle):
    ids = meta.encode(text)
    assert ids == meta_oracle.encode(text, bos=False, eos=False)
    assert meta.decode(ids) == text == meta_oracle.decode(ids)


@settings(max_examples=examples(300), deadline=None)
@given(ids=st.lists(st.integers(0, 127_999), max_size=20))
def test_decode_of_any_ids_equals_metas(ids, meta, meta_oracle):
    assert meta.decode(ids) == meta_oracle.decode(ids)


def test_known_vectors(meta):
    assert meta.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert [meta.encode(word) for word in ("user", "system", "assistant", "tool", "\n\n")] == [
        [882],
        [9125],
        [78191],
        [14506],
        [271],
    ]
    assert len(meta.encode("ipython")) > 1


def test_special_ids_equal_metas(meta, meta_oracle):
    assert meta.specials == meta_oracle.special_tokens
    assert (
        (meta.n_vocab, meta.bos_id) == (meta_oracle.n_words, meta_oracle.bos_id) == (128256, 128000)
    )
    assert meta.stop_ids == tuple(sorted(meta_oracle.stop_tokens)) == (128001, 128008, 128009)


@settings(max_examples=examples(200), deadline=None)
@given(text=st.text(alphabet="ab \n\u3000\x1c", max_size=60))
def test_cuts_equal_metas(text, meta_oracle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_module, "MAX_CHARS", 17)
        patch.setattr(meta_module, "MAX_RUN", 3)
        found = list(meta_module.pieces(text))
    parts = [text[i : i + 17] for i in range(0, len(text), 17)]
    assert found == [
        piece
        for part in parts
        for piece in meta_oracle._split_whitespaces_or_nonwhitespaces(part, 3)
    ]


def test_whitespace_means_the_same_to_re_and_to_str():
    assert [c for c in map(chr, range(0x110000)) if c.isspace() != bool(re.match(r"\s", c))] == []


# --------------------------------------------------------------------- a tiny file, without oracles


def test_ids_of_the_tiny_file(tiny):
    n_base = tiny.n_vocab - 256
    assert tiny.bos_id == n_base and tiny.stop_ids == (n_base + 1, n_base + 8, n_base + 9)
    assert tiny.special_id("<|eot_id|>") == n_base + 9
    assert [tiny.token_bytes(i) for i in tiny.encode("hello the world")] == [
        b"hello",
        b" the",
        b" world",
    ]
    assert tiny.encode("!") == [0] and tiny.encode("!", bos=True) == [n_base, 0]
    assert tiny.encode("") == [] and tiny.encode("", bos=True) == [n_base]


@settings(max_examples=examples(300), deadline=None)
@given(text=st.text() | st.text(alphabet="abceghinoprtSTOP xy\n日本é😀"))
def test_decode_undoes_encode(text, tiny):
    assert tiny.decode(tiny.encode(text, bos=True)) == text


def test_special_text_is_plain_text(tiny):
    ids = tiny.encode(SPECIAL)
    assert not set(ids) & set(tiny.specials.values())
    assert tiny.decode(ids) == SPECIAL


def test_specials_have_no_text(tiny):
    assert all(tiny.token_bytes(i) == b"" for i in tiny.specials.values())
    assert tiny.decode([tiny.bos_id, *tiny.encode("hello"), *tiny.stop_ids]) == "hello"


def test_surrogates(tiny):
    assert tiny.decode(tiny.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tiny.encode("\ud83d\ude00") == tiny.encode("😀")


def test_half_characters_decode_to_replacement(tiny):
    assert tiny.decode([i for i in range(256) if tiny.token_bytes(i) == b"\xf0"]) == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_out_of_range(token_id, tiny):
    for call in (tiny.token_bytes, lambda i: tiny.decode([0, i])):
        with pytest.raises(
            UserError, match=f"{token_id}; this tokenizer has the ids 0 to {tiny.n_vocab - 1}"
        ):
            call(token_id)


def test_unknown_special_name(tiny):
    with pytest.raises(UserError, match="'<nope>'.*begin_of_text.*251 more"):
        tiny.special_id("<nope>")


@pytest.mark.parametrize(
    "params, eom",
    [
        ({"dim": 1}, False),
        ({"use_scaled_rope": False}, False),
        ({"use_scaled_rope": True}, True),
        ({"model": {"use_scaled_rope": True}}, True),
        (None, True),
    ],
)
def test_stop_ids_follow_the_generation(params, eom, tiny_lines, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(b"\r\n".join(tiny_lines))
    if params is not None:
        (tmp_path / "original" / "params.json").write_text(json.dumps(params), encoding="utf-8-sig")
    tokenizer = open_tokenizer(None, str(tmp_path))
    base = len(tiny_lines)
    assert tokenizer.stop_ids == ((base + 1, base + 8, base + 9) if eom else (base + 1, base + 9))


def test_a_file_a_folder_or_the_checkpoint(tiny_dir, tmp_path):
    for path, ckpt_dir in (
        (tiny_dir / "tokenizer.model", tmp_path),
        (tiny_dir, tmp_path),
        (None, tiny_dir),
    ):
        assert open_tokenizer(path and str(path), str(ckpt_dir)).encode("hello") != []


# ---------------------------------------------------------------------------------------- bad files


def refusal(tmp_path, content: bytes, name: str = "tokenizer.model") -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokenizer(None, str(tmp_path))
    assert str(tmp_path) in str(error.value) and error.value.fix
    return str(error.value)


def test_missing(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(
        UserError, match="no tokenizer in .*for tokenizer.model.*has params.json.*--tokenizer_path"
    ):
        open_tokenizer(None, str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer at .*nowhere.*--tokenizer_path"):
        open_tokenizer(str(tmp_path / "nowhere"), str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_what_stands_in_for_a_file(name, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:82e9\nsize 2183982\n"
    assert "git-lfs pointer" in refusal(tmp_path, pointer, name) and "git lfs pull" in refusal(
        tmp_path, pointer, name
    )
    assert "web page" in refusal(tmp_path, b"\n<!DOCTYPE html><html><title>Sign in</title>", name)
    assert "is empty" in refusal(tmp_path, b"", name)


def test_sentencepiece(tmp_path):
    assert "sentencepiece tokenizer (Llama 1 and 2)" in refusal(tmp_path, SENTENCEPIECE)
    assert "save_pretrained" in refusal(tmp_path, SENTENCEPIECE)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda lines: lines[:300] + [b"aGVsbG8"], "line 301"),  # cut within the base64
        (lambda lines: lines[:300] + [b"aGVsbG8="], "line 301"),  # cut before the rank
        (lambda lines: lines[:300] + [lines[300][:-1]], "each once"),  # cut within the rank
        (lambda lines: lines[:10] + lines[11:], "each once"),  # a line lost
        # a token twice
        (lambda lines: lines[:10] + [lines[9].split()[0] + b" 10"] + lines[11:], "each once"),
        (lambda lines: lines[:200], "56 of 256"),
        (lambda lines: lines[:7] + [b"\x80\x02ctorch"] + lines[8:], "line 8"),
    ],
)
def test_damaged(damage, says, tiny_lines, tmp_path):
    assert says in refusal(tmp_path, b"\n".join(damage(tiny_lines)))


def test_damaged_settings(tiny_dir, tmp_path):
    for content, says in (
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold a JSON object"),
    ):
        (tmp_path / "params.json").write_text(content)
        with pytest.raises(UserError, match=f"params.json .*{says}"):
            open_tokenizer(str(tiny_dir), str(tmp_path))


@pytest.mark.parametrize("place", ["", "tokenizer.model"])
@pytest.mark.parametrize(
    "make, says",
    [
        (os.mkfifo, "pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
        (lambda path: path.symlink_to("gone"), "points to gone"),
        (lambda path: path.write_bytes(b"x") and os.truncate(path, 1 << 40), "too large"),
    ],
)
def test_no_regular_file_or_one_too_large(make, says, place, tmp_path):
    make(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match=says):
        open_tokenizer(str(tmp_path / place), str(tmp_path))


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "config.json", "params.json"]
)
def test_no_regular_settings(name, tiny_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} must be a regular file"):
        open_tokenizer(str(tiny_dir) if name == "params.json" else None, str(tmp_path))


@pytest.mark.parametrize(
    "lines, says",
    [
        ([b"AAAA " + b"9" * 4000], r"highest rank of 9+\.\.\.9+ -"),
        ([b"A" * 5_000_000 + b" 0"], "single byte"),
        ([b"AA== 0"] * 2_000_000, "more than 1,048,576 lines"),
        ([b" " * 100] * 100_000, "no tokens|single byte"),
        ([b"\x1b[31m 0"], r"x1b"),
        ([b"AA== " + b"9" * 5000], "line 1"),
    ],
)
def test_hostile_lines_end_in_one_short_error(lines, says, tmp_path):
    message = refusal(tmp_path, b"\n".join(lines))
    assert re.search(says, message) and len(message) < 600 and message.isprintable()


def test_check_vocab(tiny):
    check_vocab(tiny, tiny.n_vocab)
    check_vocab(tiny, tiny.n_vocab + 100)  # padded embedding
    for rows, says in ((tiny.n_vocab - 1, "560"), (32_000, "32,000")):
        with pytest.raises(UserError, match=f"tokenizer has 561 entries, embedding {says} "):
            check_vocab(tiny, rows)
