"""Command: starts the ranks of another command on this machine, as torchrun does, and is safe to
use beside strangers.

It is torchrun, run inside this process, but for three things. On one machine its store and that of
the ranks are files in a private folder: `torchrun --standalone`, and in torch 2.13 any torchrun
without a port, opens two TCP stores on all interfaces, and unpickles what anyone writes there. A
rank that fails is told of in one line, not in torchrun's 35. And OMP_NUM_THREADS is not warned of.

On several machines torchrun's own store stays: it must be reached from the others, and cannot be
told where to listen.
"""

import argparse
import importlib.util
import logging
import os
import signal
import sys
from typing import Any, NoReturn

from llama_tp.arch.errors import TOLD, UserError
from llama_tp.parallel.private_folder import PrivateFolder

USAGE, FAILURE = 2, 1
RANKS = ("generate", "batch", "bench")  # the commands that ranks run
FOLDER = "LLAMA_TP_FOLDER"  # the private folder's path, in the environment of the ranks


ProcessFailure = Any  # torch's, which is imported when the flags are right


class Words(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def error(self, message: str) -> NoReturn:
        leave(UserError(message, "", "--help lists the flags"), USAGE)


def main() -> None:
    """Reads the flags, runs torchrun until its ranks have ended, and leaves with the code of the
    first that failed."""
    words = parser().parse_args()
    launch = check(words)
    # The agent's log repeats at length what the ranks have said; what it raises is told below.
    logging.disable(logging.ERROR)
    # torchrun warns if it is not set; the ranks share the cores themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # torchrun's flags by another way, PET_STANDALONE among them
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    code = 0
    with PrivateFolder() as folder:
        os.environ.update({FOLDER: folder.path, TOLD: os.path.join(folder.path, "told")})
        flags = [
            *rendezvous(words, folder.path),
            "--nproc_per_node",
            str(words.nproc_per_node),
            "--log_dir",
            os.path.join(folder.path, "log"),
        ]
        try:
            torchrun.run(torchrun.parse_args([*flags, *launch]))
        except ChildFailedError as error:
            code = tell(*error.get_first_failure())
        except SignalException as error:
            code = 128 + error.sigval
        except Exception as error:
            code = FAILURE
            say(
                UserError(
                    "torchrun cannot start the ranks",
                    f"{type(error).__name__}: {error}".split("\n")[0],
                    "with several machines, check that all can reach --master_addr, and that "
                    "--master_port is free there",
                )
            )
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    """The flags, which are torchrun's; all from the command on belongs to the command."""
    words = Words(
        prog="python -m llama_tp.launch",
        description="Start the ranks of a command: torchrun without open ports.",
        epilog=f"COMMAND is one of {', '.join(RANKS)}, or a script.py; -m MODULE takes any module.",
        allow_abbrev=False,
    )
    words.add_argument(
        "--nproc_per_node", type=int, default=1, metavar="N", help="ranks on this machine"
    )
    words.add_argument(
        "--nnodes", type=int, default=1, metavar="N", help="machines; run this on each of them"
    )
    words.add_argument(
        "--node_rank", type=int, default=0, metavar="I", help="which of them this is"
    )
    words.add_argument(
        "--master_addr", metavar="HOST", help="address of machine 0, as the others see it"
    )
    words.add_argument(
        "--master_port",
        type=int,
        default=29500,
        metavar="PORT",
        help="a free port there; the one after it must be free too",
    )
    words.add_argument(
        "-m", dest="module", action="store_true", help="COMMAND is a module's full name"
    )
    words.add_argument("command", metavar="COMMAND")
    words.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its flags")
    return words


def check(words: argparse.Namespace) -> list[str]:
    """What torchrun is to start: a script or "-m" and a module, with the words that follow it.
    Leaves with one line if it cannot be started by ranks."""
    for name, least in (("nproc_per_node", 1), ("nnodes", 1), ("node_rank", 0)):
        if getattr(words, name) < least:
            leave(
                UserError(
                    f"--{name} is out of range",
                    f"found {getattr(words, name)}",
                    f"give {least} or more",
                ),
                USAGE,
            )
    if words.node_rank >= words.nnodes:
        leave(
            UserError(
                "--node_rank is out of range",
                f"found {words.node_rank} of {words.nnodes}",
                "they count from 0",
            ),
            USAGE,
        )
    if words.nnodes > 1 and words.master_addr is None:
        leave(
            UserError(
                "several machines need an address to meet at",
                "--master_addr is not given",
                "give --master_addr the address of machine 0, as the others see it",
            ),
            USAGE,
        )
    if importlib.util.find_spec("torch") is None:
        leave(
            UserError(
                "this Python has no torch",
                f"it is {sys.executable}",
                "run 'make setup', then: source .venv/bin/activate",
            ),
            FAILURE,
        )
    if words.module:
        return ["-m", words.command, *words.rest]
    if words.command in RANKS:
        return ["-m", f"llama_tp.{words.command}", *words.rest]
    if words.command == "serve":  # starts its ranks itself, through this very module
        flags = (
            []
            if any(word.partition("=")[0] == "--nproc_per_node" for word in words.rest)
            else ["--nproc_per_node", str(words.nproc_per_node)]
        )
        os.execv(sys.executable, [sys.executable, "-m", "llama_tp.serve", *flags, *words.rest])
    if os.path.isfile(words.command):
        return [words.command, *words.rest]
    fix = (
        "write python -m llama_tp.chat"
        if words.command == "chat"
        else "or give a script's path, or -m and a module"
    )
    leave(
        UserError(
            f"{words.command!r} is no command for ranks",
            f"these are: {', '.join([*RANKS, 'serve'])}",
            fix,
        ),
        USAGE,
    )


def rendezvous(words: argparse.Namespace, folder: str) -> list[str]:
    """torchrun's flags for how agents meet: one in a file, several at the master's address."""
    if words.nnodes > 1:
        return [
            "--nnodes",
            str(words.nnodes),
            "--node_rank",
            str(words.node_rank),
            "--master_addr",
            words.master_addr,
            "--master_port",
            str(words.master_port),
        ]
    # else the agent opens a TCP store for the ranks beside its own
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # One agent has nobody to show that it lives, and a file store only grows: each sign would stay
    # in it.
    return [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        os.path.join(folder, "agent"),
        "--rdzv_id",
        os.path.basename(folder),
        "--rdzv_conf",
        f"store_type=file,keep_alive_interval={10**8}",
    ]


def tell(rank: int, failure: ProcessFailure) -> int:
    """Says that a rank was killed, unless a rank has said why; any other failure has been printed
    by the rank itself. -> The code to leave with."""
    code: int = failure.exitcode
    if code < 0 and not os.path.exists(os.environ[TOLD]):
        hint = (
            "often the machine is out of memory"
            if -code == signal.SIGKILL
            else "it crashed, or somebody ended it"
        )
        say(
            UserError(
                f"rank {rank} (pid {failure.pid}) was ended by {failure.signal_name()}",
                hint,
                "start it again",
            )
        )
    return code if code > 0 else FAILURE


def say(error: UserError) -> None:
    """One line, as every command has it."""
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr, flush=True)


def leave(error: UserError, code: int) -> NoReturn:
    """Says `error` and ends this process."""
    say(error)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # while torch is imported; later torchrun listens to it
        sys.exit(128 + signal.SIGINT)
