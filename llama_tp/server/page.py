"""The page at GET /: one file beside this one, with no build step and nothing from elsewhere.

Its policy lets the browser run exactly the script and the style that are in the file, known by
their hashes, and talk to nobody but this server.
"""

import base64
import functools
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("page.html")


@functools.cache
def page() -> str:
    """The page's text."""
    return FILE.read_text(encoding="utf-8")


def _hash(tag: str) -> str:
    [inner] = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)
    return "'sha256-" + base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode() + "'"


def headers() -> dict[str, str]:
    """Of the reply that carries the page."""
    policy = (
        f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
        "connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"content-security-policy": policy, "cache-control": "no-cache"}
