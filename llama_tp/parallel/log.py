"""Lines for people, on stderr: stdout belongs to generated text. One voice: the driver's, unless
something is wrong.

Plain prints and no logging tree: a rank has one reader, the terminal or the launcher's log file.
"""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

from llama_tp.parallel.groups import Ranks


def say(text: str, ranks: Ranks | None = None, quiet: bool = False) -> None:
    """Prints a line of information, on the driver only; `quiet` drops it (commands pass their
    --quiet)."""
    if not quiet and (ranks is None or ranks.is_driver):
        write(text + "\n")


def warn(text: str, ranks: Ranks | None = None) -> None:
    """Prints a warning, also when quiet: from the driver as it is, from others with their rank in
    front."""
    prefix = "" if ranks is None or ranks.is_driver else f"[rank {ranks.rank}] "
    write(f"{prefix}warning: {text}\n")


def write(text: str) -> None:
    """One write for the whole text, so that lines of several ranks do not mix; a closed stderr is
    not our failure."""
    try:
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), text.encode(errors="replace"))
    except (OSError, ValueError):
        return


class Progress:
    """How far a long piece of work in bytes is: a bar on a terminal, a plain line every few seconds
    elsewhere."""

    LINE_EVERY_S = 5.0

    def __init__(self, what: str, total: int, shown: bool = True):
        self.what, self.total, self.shown = what, total, shown
        self.started = self.said_at = time.monotonic()
        on_terminal = shown and sys.stderr.isatty()
        self.bar = (
            tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False)
            if on_terminal
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def at(self, done: int) -> None:
        """Shows that `done` bytes are behind us."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif self.shown and now - self.said_at >= self.LINE_EVERY_S:
            self.said_at = now
            speed = done / 1e9 / (now - self.started)
            say(f"{self.what}: {done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {speed:.2f} GB/s")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None and self.shown:
            took_s, total_gb = max(time.monotonic() - self.started, 1e-9), self.total / 1e9
            say(
                f"{self.what}: {total_gb:.2f} GB in {took_s:.1f} s ({total_gb / took_s:.2f} GB/s "
                "over all ranks)"
            )
