"""Servers that the real clients talk to: two ranks on the demo model, once as it is and once with
room for tools."""

import json

import pytest

from tests.servers import DEMO, serving

MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="session")
def roomy(tmp_path_factory):
    """The demo model with a context of 4096: what a model is told of tools fills its own 512, in
    its short tokens."""
    folder = tmp_path_factory.mktemp("roomy") / "demo"
    folder.mkdir()
    for path in DEMO.iterdir():
        if path.name == "params.json":
            (folder / path.name).write_text(
                json.dumps(json.loads(path.read_text()) | {"max_context": 4096})
            )
        else:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def server(roomy):
    """`serve` with two ranks; nothing that clients do may leave a traceback in its log or a 5xx in
    its books."""
    with serving("--nproc_per_node", "2", ckpt_dir=roomy) as one:
        yield one
        assert not one.failures()
        assert one.end() == 0 and "Traceback" not in one.stderr, one.stderr
