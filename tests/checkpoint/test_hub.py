"""`org/name`: what is asked of huggingface_hub, with a fake at the seam, and no network
anywhere."""

import sys
from types import SimpleNamespace

import pytest

from llama_tp.arch.errors import UserError
from llama_tp.checkpoint.hub import fetch
from llama_tp.checkpoint.source import open_checkpoint
from tests.checkpoint.make import GQA, random_weights, write_hf, write_meta


@pytest.fixture
def hub(monkeypatch):
    """A fake hub: `files` it lists, `folder` it hands out, `asked` of it; `folder` None is an
    error."""
    fake = SimpleNamespace(files=[], folder=None, asked=[])

    def snapshot_download(repo, **options):
        fake.asked.append((repo, options))
        if fake.folder is None:
            raise RuntimeError("401 Client Error. Access is restricted")
        return str(fake.folder)

    module = SimpleNamespace(
        snapshot_download=snapshot_download,
        HfApi=lambda: SimpleNamespace(list_repo_files=lambda repo: fake.files),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return fake


def test_a_folder_is_itself_and_asks_nobody(tmp_path, hub, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert fetch("org/name") == "org/name" and fetch("/a/b") == "/a/b" and fetch("../x") == "../x"
    assert not hub.asked


def test_a_misspelt_name_in_a_folder_that_is_here_asks_nobody(tmp_path, hub, monkeypatch):
    (tmp_path / "checkpoints" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="checkpoints/dmeo"):
        open_checkpoint(fetch("checkpoints/dmeo"))
    assert not hub.asked


def test_one_rank_downloads_and_the_others_find_it(tmp_path, hub):
    hub.files, hub.folder = (
        ["config.json", "model.safetensors", "original/consolidated.00.pth"],
        tmp_path,
    )
    write_hf(tmp_path, GQA, random_weights(GQA))
    assert fetch("org/name") == str(tmp_path)
    patterns = hub.asked[0][1]["allow_patterns"]
    assert "*.safetensors" in patterns and "original/*" not in patterns  # not the weights twice
    assert open_checkpoint("org/name").layout == "hf"
    assert hub.asked[1] == ("org/name", {"local_files_only": True})


def test_a_model_without_safetensors_comes_in_metas_layout(tmp_path, hub):
    hub.files, hub.folder = ["original/params.json", "original/consolidated.00.pth"], tmp_path
    write_meta(tmp_path / "original", GQA, random_weights(GQA), 1)
    fetch("org/name")
    assert "original/*" in hub.asked[0][1]["allow_patterns"]
    assert open_checkpoint("org/name").layout == "meta"


def test_a_refusal_says_what_to_do(hub):
    hub.files = ["model.safetensors"]
    with pytest.raises(UserError, match=r"org/name is no folder here.*restricted.*HF_TOKEN"):
        fetch("org/name")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"llama_tp\[hf\]"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    "name",
    [
        "org/" + "n" * 10**6,
        "o" * 10**6 + "/name",
        "org/a..b",
        "org/name\x1b[31m",
        "org/../name",
        "org/n\0",
        "",
        "/" * 5000,
        "org/name/more",
        "org//name",
        "é/ü",
    ],
)
def test_a_hostile_name_is_asked_for_or_refused_in_one_short_error(name, hub):
    with pytest.raises(UserError) as caught:
        open_checkpoint(fetch(name))
    assert len(str(caught.value)) < 1000 + min(len(name), 5000) and caught.value.fix
    assert all(repo == name and "/" in name and "\x1b" not in name for repo, _ in hub.asked)
