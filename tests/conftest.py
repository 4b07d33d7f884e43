"""The --slow switch: tests marked slow (many ranks, big files, peers, and what repeats a class of
fault) are skipped without it. `-m slow` chooses only them, and so runs them too.

`make test` runs two workers (pytest-xdist), a file at a time each.
"""

import os
import signal
import sys

import hypothesis
import pytest
import torch

from tests.examples import SLOW

# two cores: the ranks of a pool need them, and tiny models gain nothing from more
torch.set_num_threads(1)

# A shell that starts the tests in the background has them ignore these, and so would all that they
# start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Hypothesis fails an example that takes 200 ms, and data that come slowly: on a busy machine any
# does.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


# The files that take longest, the longest first. Workers begin with them, so that none is left
# alone with one at the end.
LONGEST = (
    "test_batch.py",
    "test_serve.py",
    "test_launch.py",
    "test_failures.py",
    "test_invariance.py",
    "test_health.py",
    "test_generate.py",
    "test_docs.py",
    "test_listeners.py",
    "test_app.py",
)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption(
        "--rewrite", action="store_true", help="write the transcripts in tests/golden anew"
    )


def pytest_configure(config):
    if runs_slow(config):
        os.environ[SLOW] = "1"


def runs_slow(config) -> bool:
    return config.getoption("--slow") or "slow" in (config.getoption("-m") or "").split()


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if runs_slow(config):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow (make test-slow)")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_sessionfinish():
    # a worker of pytest-xdist leaves without running atexit functions
    if "tests.ranks" in sys.modules:
        sys.modules["tests.ranks"].stop_pools()
