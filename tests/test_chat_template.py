"""--chat_template hf behind every door: a small Hugging Face folder whose own template encodes the
dialogs."""

import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from llama_tp.arch.config import ModelConfig
from llama_tp.batch import TEMPLATES_DATE
from llama_tp.text.chat_format import ChatFormat
from llama_tp.text.template import open_template
from llama_tp.text.tokenizer import open_tokenizer
from tests import ranks
from tests.checkpoint.make import random_weights, write_hf
from tests.ranks import ROOT
from tests.servers import serving

pytest.importorskip("jinja2")
SMALL = ModelConfig(
    dim=64,
    n_layers=1,
    n_heads=8,
    n_kv_heads=4,
    head_dim=8,
    ffn_dim=96,
    vocab_size=1512,
    max_context=256,
)
TEMPLATE = (
    "{{ bos_token }}On {{ strftime_now('%d %b %Y') }}\n{% for message in messages "
    "%}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>{{ message.content | trim }}<|eot_id|>{% endfor %}{% if "
    "add_generation_prompt %}Answer:{% endif %}"
)
USER = [{"role": "user", "content": " Who are you? "}]
HF = ["--chat_template", "hf"]


def write_folder(folder: Path, template: str | None) -> Path:
    write_hf(folder, SMALL, random_weights(SMALL))
    shutil.copy(ROOT / "checkpoints/demo/tokenizer.model", folder)
    config = {"bos_token": {"content": "<|begin_of_text|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value})
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hf"), TEMPLATE)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The same without a template."""
    return write_folder(tmp_path_factory.mktemp("bare"), None)


def ids_of(folder: Path, now: datetime, **options) -> list[int]:
    return open_template(str(folder), open_tokenizer(None, str(folder)), now).encode_dialog(
        USER, **options
    )


def command(name: str, folder: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    return ranks.command(name, "--ckpt_dir", str(folder), "--device", "cpu", *words, code=code)


def test_the_template_is_not_metas_format(folder):
    text = open_tokenizer(None, str(folder))
    metas = ChatFormat(text).encode_dialog(USER)
    assert ids_of(folder, datetime(2020, 2, 3)) != metas and "On 03 Feb 2020" in text.decode(
        ids_of(folder, datetime(2020, 2, 3))
    )


def test_generate_and_the_python_api(folder):
    words = [
        "--chat",
        "--prompt",
        USER[0]["content"],
        "--echo",
        "--json",
        "--temperature",
        "0",
        "--max_gen_len",
        "6",
    ]
    [line] = command("generate", folder, *words, *HF).stdout.splitlines()
    expected = ids_of(folder, datetime.now())
    made = json.loads(line)["tokens"]
    assert made[:-6] == expected
    [line] = command("generate", folder, *words).stdout.splitlines()
    assert json.loads(line)["tokens"][:-6] == ChatFormat(
        open_tokenizer(None, str(folder))
    ).encode_dialog(USER)
    script = f"""
from llama_tp import Llama, SamplingParams
llm = Llama.build(ckpt_dir={str(folder)!r}, device="cpu", chat_template="hf")
params = SamplingParams(max_tokens=6, temperature=0)
print(llm.chat({USER!r}, params).tokens == llm.complete({expected!r}, params).tokens == {made[-6:]!r})
print(len(llm.chat_completion([{USER!r}], temperature=0, max_gen_len=3, logprobs=True)[0]["tokens"]))
"""  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100
    )
    assert done.stdout == "True\n3\n", done.stdout + done.stderr


def test_serve_and_its_tokenize(folder):
    with serving(*HF, ckpt_dir=folder) as server:
        for prompt in (True, False):
            ids = ids_of(folder, datetime.now(), add_generation_prompt=prompt)
            body = {"messages": USER, "add_generation_prompt": prompt}
            assert server.post("/tokenize", body)[1]["tokens"] == ids
            status, reply = server.post(
                "/v1/chat/completions", {**body, "max_tokens": 2, "return_token_ids": True}
            )
            assert status == 200 and reply["choices"][0]["prompt_token_ids"] == ids
        status, reply = server.post(
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": False},
        )
        assert status == 200
        assert server.end() == 0, server.stderr


def test_batch_repeats_itself_on_any_day_and_refuses_another_format(folder, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        json.dumps({"messages": USER, "return_token_ids": True, "max_tokens": 4}) + "\n"
    )
    files = ["--input", str(source), "--output", str(target)]
    command("batch", folder, *files, *HF)
    [line] = target.read_text().splitlines()
    assert json.loads(line)["response"]["body"]["choices"][0]["prompt_token_ids"] == ids_of(
        folder, TEMPLATES_DATE
    )
    before = target.read_bytes()
    assert "chat_template was hf and is meta" in command("batch", folder, *files, code=1).stderr
    other = shutil.copytree(folder, tmp_path / folder.name)
    (other / "chat_template.jinja").write_text(TEMPLATE + " ")
    assert "the chat template is another" in command("batch", other, *files, *HF, code=1).stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    "name, words",
    [
        ("generate", ["--chat", "--prompt", "x"]),
        ("serve", ["--port", "0"]),
        ("batch", ["--input", "Makefile", "--output", "{}"]),
    ],
)
def test_a_folder_without_a_template_is_told_before_anything_is_loaded(name, words, bare, tmp_path):
    output = tmp_path / "out.jsonl"
    done = command(name, bare, *HF, *(word.replace("{}", str(output)) for word in words), code=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and f"{bare} has no chat template" in errors[0]
        and "leave out --chat_template hf" in errors[0]
    )
    assert (
        "loading" not in done.stderr
        and "listening" not in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not output.exists()


def test_a_template_without_a_chat_and_an_unknown_one_are_refused(folder):
    assert "add --chat" in command("generate", folder, "--prompt", "x", *HF, code=1).stderr
    assert (
        "one of meta, hf"
        in command("generate", folder, "--prompt", "x", "--chat_template", "chatml", code=2).stderr
    )
