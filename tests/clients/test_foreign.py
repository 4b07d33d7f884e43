"""Clients whose pins clash with ours or each other's: each runs in an environment of its own, which
`make test-clients` makes of the .txt beside this file, as a script that talks to a server with real
ranks and checks what it gets. NAME_old is an older NAME.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.ranks import ROOT

HERE, ENVIRONMENTS = Path(__file__).parent, ROOT / ".venv" / "clients"


def python_of(name: str) -> Path:
    return ENVIRONMENTS / name / "bin" / "python"


NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not python_of(name).exists(),
            reason=f"{name} needs an environment of its own: make test-clients",
        ),
    )
    for name in sorted(path.stem for path in HERE.glob("*.txt"))
]


@pytest.mark.parametrize("name", NAMES)
def test_client(name, server, tmp_path):
    env = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    # nobody is to be asked but our server, and nothing left in the user's caches
    env |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": str(tmp_path),
    }
    command = [python_of(name), HERE / f"use_{name.removesuffix('_old')}.py", server.url]
    done = subprocess.run(
        command,
        cwd=HERE,
        env=env,
        timeout=280,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    print(done.stdout)
