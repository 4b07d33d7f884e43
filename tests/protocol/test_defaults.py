"""What requests mean that do not say it: a folder's generation_config.json, as vLLM reads it, and a
command's flags over it."""

import json
import os

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.protocol.defaults import (
    MAX_BYTES,
    SamplingDefaults,
    generation_config_of,
    sampling_flags,
)
from llama_tp.protocol.fields import check_body
from llama_tp.protocol.order import prepare
from tests.protocol.served import MODEL, USER

# Llama 3.1 8B Instruct's own, and what else such a file may say
LLAMA = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.42.3",
}
MUCH = {
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "max_new_tokens": 50,
    "max_length": 4096,
    "do_sample": False,
    "penalty_alpha": 0.6,
}


def written(folder, content) -> str:
    (folder / "generation_config.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )
    return str(folder)


def params(defaults: SamplingDefaults, kind: str, **fields):
    """The sampling of a request with these fields."""
    body = ({"messages": USER} if kind == "chat" else {"prompt": "x"}) | fields
    return prepare(check_body(kind, defaults.fill(body, kind)), MODEL, "id").requests[0].params


def test_llamas_own_file_is_what_requests_mean(tmp_path):
    file = generation_config_of(written(tmp_path, LLAMA), "auto")
    for kind in ("chat", "completion"):
        found = params(SamplingDefaults(file), kind)
        assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (
            0.6,
            0.9,
            0,
            1.0,
        )
        # null is absent
        assert params(SamplingDefaults(file), kind, temperature=None, top_p=0.5).top_p == 0.5
        assert params(SamplingDefaults(file), kind, temperature=0).temperature == 0
    assert str(SamplingDefaults(file)) == "temperature 0.6, top_p 0.9 (generation_config.json)"


def test_six_keys_count_and_completions_keep_openais_length(tmp_path):
    file = generation_config_of(written(tmp_path, MUCH), "auto")
    assert file == {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "max_tokens": 50,
    }
    chat, completion = (
        params(SamplingDefaults(file), "chat"),
        params(SamplingDefaults(file), "completion"),
    )
    assert (chat.top_k, chat.min_p, chat.repetition_penalty, chat.max_tokens) == (
        20,
        0.05,
        1.05,
        50,
    )
    assert (completion.top_k, completion.max_tokens) == (20, 16)
    assert params(SamplingDefaults(file), "chat", max_tokens=90).max_tokens == 90  # no ceiling
    assert params(SamplingDefaults(file), "chat", max_completion_tokens=90).max_tokens == 90


def test_flags_win_over_the_file_and_requests_over_both(tmp_path):
    defaults = SamplingDefaults(
        generation_config_of(written(tmp_path, MUCH), "auto"),
        sampling_flags(temperature=0.0, top_p=None, max_tokens=30),
    )
    for kind in ("chat", "completion"):
        found = params(defaults, kind)
        assert (found.temperature, found.top_p, found.max_tokens) == (0.0, 0.8, 30)
        assert params(defaults, kind, temperature=1, max_tokens=5).max_tokens == 5
    assert str(defaults).startswith(
        "temperature 0, top_p 0.8,"
    ) and "(generation_config.json and flags)" in str(defaults)


def test_where_the_file_is_looked_for(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    written(other, LLAMA)
    assert generation_config_of(str(tmp_path), "auto") == {}
    assert (
        "as OpenAI has them" in str(SamplingDefaults())
        and params(SamplingDefaults(), "chat").temperature == 1
    )
    assert generation_config_of(str(other), "none") == {}
    for path in (other, other / "generation_config.json"):
        assert generation_config_of(str(tmp_path), str(path)) == {"temperature": 0.6, "top_p": 0.9}
    with pytest.raises(UserError, match="is not there"):
        generation_config_of(str(tmp_path), str(tmp_path / "none"))


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "is empty"),
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"temperature": NaN}', "temperature must be a number"),
        ('{"top_p": 1e400}', "top_p must be a number"),
        ('{"top_p": 1' + "0" * 5000 + "}", "is not valid JSON"),
        ("[" * 10**5, "is not valid JSON"),
        ('{"top_p": 0.5, "top_p": 0.6}', "stands there twice"),
        ({"temperature": "0.6"}, "temperature must be a number"),
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": True}, "temperature must be"),
        ({"top_p": [0.9]}, "top_p must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"top_k": 1.5}, "top_k must be"),
        ({"top_k": 2**40}, "top_k must be"),
        ({"min_p": 2}, "min_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_new_tokens": 10**400}, "max_new_tokens must be"),
        ({"temperature": {}}, "temperature must be"),
    ],
)
def test_a_file_that_is_wrong_is_one_clear_error(content, says, tmp_path):
    folder = written(tmp_path, content)
    with pytest.raises(UserError) as caught:
        generation_config_of(folder, "auto")
    assert (
        says in str(caught.value)
        and str(tmp_path) in str(caught.value)
        and "--generation_config none" in caught.value.fix
    )
    assert generation_config_of(folder, "none") == {}


def test_what_is_no_honest_file_is_not_opened(tmp_path):
    file = tmp_path / "generation_config.json"
    for make, says in [
        (lambda: os.mkfifo(file), "regular file"),
        (lambda: file.symlink_to("/dev/zero"), "regular file"),
        (file.mkdir, "found a folder"),
        (lambda: file.symlink_to(tmp_path / "gone"), "is a link to a file that is not there"),
        (lambda: file.write_bytes(b" " * (MAX_BYTES + 1)), "is too large"),
    ]:
        make()
        with pytest.raises(UserError, match=says):
            generation_config_of(str(tmp_path), "auto")
        file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"temperature": -1.0}, "--temperature must be"),
        ({"top_p": 0.0}, "--top_p must be"),
        ({"top_k": -2}, "--top_k must be"),
        ({"min_p": 1.5}, "--min_p must be"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty must be"),
        ({"max_tokens": 0}, "--max_gen_len must be"),
        ({"max_tokens": -1}, "--max_gen_len must be"),
    ],
)
def test_flags_out_of_range_are_named(flags, says):
    with pytest.raises(UserError, match=says):
        sampling_flags(**flags)
