"""Lines for people, on stderr: stdout belongs to generated text. One voice: the driver's, unless something is wrong.

Plain prints and no logging tree: a rank has one reader, the terminal or the launcher's log file.
"""

import os
import sys

from llama_tp.parallel.groups import Ranks


def say(text: str, ranks: Ranks | None = None, quiet: bool = False) -> None:
    """Prints a line of information, on the driver only; `quiet` drops it (commands pass their --quiet)."""
    if not quiet and (ranks is None or ranks.is_driver):
        write(text + "\n")


def warn(text: str, ranks: Ranks | None = None) -> None:
    """Prints a warning, also when quiet: from the driver as it is, from others with their rank in front."""
    prefix = "" if ranks is None or ranks.is_driver else f"[rank {ranks.rank}] "
    write(f"{prefix}warning: {text}\n")


def write(text: str) -> None:
    """One write for the whole text, so that lines of several ranks do not mix; a closed stderr is not our failure."""
    try:
        sys.stderr.flush()
        os.write(sys.stderr.fileno(), text.encode(errors="replace"))
    except (OSError, ValueError):
        return
