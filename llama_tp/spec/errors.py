"""The one exception that a user is meant to read.

Every message has the same three parts: *what is wrong - what was found - what to do*. Commands print it as one line
and leave with a non-zero code; the Python API raises it. Anything else that escapes is our bug and keeps its traceback.
"""


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
