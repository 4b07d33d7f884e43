"""The events of a streamed reply, out of its bytes as they come. For what talks to servers."""

import json
import re
from typing import Any


class Events:
    """One reply. `done` says that [DONE] has come.

    Lines end where server-sent events have it, at CR and LF. Those of httpx and `splitlines` also
    end at U+2028 and others, which may stand in JSON as they are, and would cut it.
    """

    def __init__(self) -> None:
        self.done = False
        self._held = b""

    def push(self, data: bytes) -> list[dict[str, Any]]:
        """The JSON of the events that `data` completes. ValueError for an event that holds no JSON
        object."""
        *lines, self._held = re.split(rb"[\r\n]", self._held + data)
        found = []
        for line in lines:
            # else a comment, or another field
            text = line[5:].strip() if line.startswith(b"data:") else b""
            if text == b"[DONE]":
                self.done = True
            elif text:
                found.append(_object(text))
        return found


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("an event is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"an event is no JSON object: {text[:80]!r}")
    return found
