"""Command: `llama-tp NAME ...`, which is `python -m llama_tp.NAME ...`.

It finds the command and becomes it. Nothing of the package is imported before, torch least of all.
"""

import difflib
import os
import sys

COMMANDS = {
    "generate": "write text from prompts",
    "chat": "talk with a server in the terminal",
    "serve": "answer OpenAI's clients over HTTP",
    "batch": "answer a file of requests",
    "bench": "measure speed beside what the machine could do",
    "launch": "start the ranks of generate, batch or bench on this machine",
}
USAGE = 2  # exit code of a wrong command, as of a wrong flag


def main() -> None:
    """Becomes the command that is named first, with the words behind it."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(help_text())
    elif name in COMMANDS:
        # Another process image under the same pid: a rank's siblings know it by its command line.
        python = [sys.executable, "-m", f"llama_tp.{name}", *words]
        os.execv(sys.executable, python)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean {near[0]}?" if near else "llama-tp --help lists the commands"
        print(f"error: there is no such command - found {name[:80]!r} - {fix}", file=sys.stderr)
        sys.exit(USAGE)


def help_text() -> str:
    """What --help prints."""
    lines = [f"    {name:10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "Tensor-parallel inference for Llama 3.",
            "",
            "usage: llama-tp COMMAND [FLAGS]",
            "",
            *lines,
            "",
            "llama-tp COMMAND --help lists the flags of a command.",
        ]
    )


if __name__ == "__main__":
    main()
