"""The one exception that a user is meant to read.

Every message has the same three parts: *what is wrong - what was found - what to do*. Commands print it as one line
and leave with a non-zero code; the Python API raises it. Anything else that escapes is our bug and keeps its traceback.
"""

import contextlib
import os
from itertools import islice

TOLD = "LLAMA_TP_TOLD"          # in the environment of ranks: a file that says that somebody has told why the job ends


def shown(value: object, most: int = 80) -> str:
    """The first characters of `value`, for `found`. A list of millions is not spelled out for them."""
    return str(_begun(value, most))[:most]


def _begun(value: object, most: int) -> object:
    """`value` with the first elements only of every list and dict in it."""
    if isinstance(value, dict):
        return {key: _begun(each, most) for key, each in islice(value.items(), most)}
    if isinstance(value, (list, tuple)):
        return type(value)([_begun(each, most) for each in islice(value, most)])
    return value[:most] if isinstance(value, str) else value


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
    """Lets the launcher know that the reason for the end has been printed: it need not look for one."""
    if os.environ.get(TOLD):
        with contextlib.suppress(OSError), open(os.environ[TOLD], "w"):
            pass
