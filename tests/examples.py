"""How many examples hypothesis tries: all with --slow, else at most MOST."""

import os

MOST = 100
SLOW = "LLAMA_TP_TEST_SLOW"  # set by conftest.py, before test modules are imported


def examples(n: int) -> int:
    """The number for `settings(max_examples=...)` of a test that may try `n`."""
    return n if os.environ.get(SLOW) else min(n, MOST)
