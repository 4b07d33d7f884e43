"""The one exception that a user is meant to read.

Every message has the same three parts: *what is wrong - what was found - what to do*. Commands
print it as one line and leave with a non-zero code; the Python API raises it. Anything else that
escapes is our bug and keeps its traceback.
"""

import contextlib
import os
import reprlib

# in the environment of ranks: a file that says that somebody has told why the job ends
TOLD = "LLAMA_TP_TOLD"
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40


def short(value: object) -> str:
    """What a value looks like, for `found`: at most 80 characters, none of them a control
    character. Of a list of millions only the first elements are looked at."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class UserError(Exception):
    """Bad input, bad files or a bad launch.

    Args:
        what: what is wrong, in one clause.
        found: what was found instead (the value, the file, the numbers).
        fix: what to do about it.
    """

    def __init__(self, what: str, found: str = "", fix: str = ""):
        self.what, self.found, self.fix = what, found, fix
        super().__init__(" - ".join(part for part in (what, found, fix) if part))


def mark_told() -> None:
    """Lets the launcher know that the reason for the end has been printed: it need not look for
    one."""
    if os.environ.get(TOLD):
        with contextlib.suppress(OSError), open(os.environ[TOLD], "w"):
            pass
