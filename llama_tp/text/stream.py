"""Token ids in, finished text out, piece by piece: whole characters only, and never the beginning
of a stop string.

A token may be a third of an emoji, or hold the end of one word and a stop string and more. The
stream keeps only what it cannot decide yet: bytes of an unfinished character, and text that may
grow into a stop string. Knows no requests.
"""

import codecs
from collections.abc import Iterable, Sequence

from llama_tp.arch.errors import UserError
from llama_tp.text.token_table import Tokenizer


class TextStream:
    """The text of one completion as it grows. All the pieces together are `tokenizer.decode` of all
    the ids, cut before the stop string that is the first to be complete (of two that end together,
    the longer): the same text for every way of grouping the ids. A push costs time in the length of
    the new text and the longest stop string.

    `stopped` is the stop string that was met, None until then. Raises UserError for an empty stop
    string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()):
        self.stopped: str | None = None
        self.set_stop_strings(stop)
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def set_stop_strings(self, stop: str | Sequence[str]) -> None:
        """Looks for these stop strings from now on, in text that is still held or yet to come."""
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise UserError(
                "a stop string must not be empty",
                f"found {list(self._stop)!r}",
                "leave the empty one out",
            )
        self._longest = max(map(len, self._stop), default=1)

    def push(self, ids: Iterable[int]) -> str:
        """Text that has become certain with `ids`; "" once stopped."""
        self._take(b"".join(map(self._token_bytes, ids)), final=False)
        return self._release(len(self._held) - self._n_undecided())

    def finish(self) -> str:
        """What was held back, at the end of the ids: an unfinished character as U+FFFD."""
        self._take(b"", final=True)
        return self._release(len(self._held))

    def _take(self, data: bytes, final: bool) -> None:
        """Adds text to what is held; cuts it at the first complete stop string."""
        if self.stopped is not None:
            return
        self._held += self._utf8.decode(data, final)
        found = [(self._held.index(s) + len(s), -len(s), s) for s in self._stop if s in self._held]
        if found:
            end, _, self.stopped = min(found)
            self._held = self._held[: end - len(self.stopped)]

    def _n_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        if self.stopped is not None:
            return 0
        for n in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stop):
                return n
        return 0

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text
