"""From what is known of each rank to one sentence about what went wrong.

Pure: a table of signs of life and a clock go in, a `Cause` or None comes out, so every judgement
can be tested without a process. Refuses to know how signs travel and what happens to the job
(health).
"""

import math
import re
import traceback
from dataclasses import dataclass, field

import torch.distributed as dist

from llama_tp.arch.errors import UserError

ERROR_CHARS = 20_000  # of a traceback, its end
# How gloo and NCCL put it, in plain RuntimeErrors, when another rank has gone or does not come.
ECHO = re.compile(
    r"gloo|NCCL|connection (closed|reset|refused|was)|timed out waiting|broken pipe", re.IGNORECASE
)

# A rank that has left cleanly may do so a moment before its peers end the same step; then it is
# their turn to worry.
LEFT_GRACE_S = 10.0
# Signs come every second; one that is missing for this long is worth a word when it explains a
# hang.
MISSED_S = 2.5


@dataclass
class Sign:
    """What a rank says about itself once a second.

    `what` names the work that its main thread is in ("load", "step 17"; empty: user code, or
    waiting for a request), `busy_s` for how long, `limit_s` how long it may take (infinite: a wait
    that only ends with the peers). `collectives` counts collectives entered: of ranks that wait for
    each other, the one with the lower count is late. `error` is set by a rank that has failed;
    `echo` if that error only says that some other rank went away.
    """

    call: int = 0
    step: int = 0
    collectives: int = 0
    what: str = ""
    busy_s: float = 0.0
    limit_s: float = math.inf
    where: str = ""
    error: str = ""
    echo: bool = False
    left: bool = False  # said good-bye
    signal: str = ""  # the signal that told it to end; it does so in a moment
    done: int = 0  # work counted so far (bytes loaded), for a progress bar over all ranks


@dataclass
class Seen:
    """A rank as seen from here: its last sign, when it was heard, whether its connection broke."""

    rank: int
    heard: float
    pid: int = 0
    host: str = ""
    sign: Sign = field(default_factory=Sign)
    lost: bool = False

    @property
    def name(self) -> str:
        return (
            f"rank {self.rank} (pid {self.pid}, host {self.host})"
            if self.pid
            else f"rank {self.rank}"
        )

    @property
    def gone(self) -> bool:
        """Ended in an orderly way, so nothing more is expected of it."""
        return self.sign.left or bool(self.sign.signal)

    def busy_s(self, now: float) -> float:
        """Seconds that the main thread has been in `sign.what`, also while no signs come."""
        return self.sign.busy_s + max(0.0, now - self.heard) if self.sign.what else 0.0


@dataclass(frozen=True)
class Cause:
    """What ended the job. Lower weight = nearer to the root: an exception explains a death, a death
    explains a hang."""

    weight: int
    text: str


def diagnose(table: list[Seen], now: float, idle_limit_s: float) -> Cause | None:
    """The best explanation of what is wrong at this moment, or None if nothing is.

    Args:
        table: the ranks to judge, one `Seen` each, the driver first.
        now: the clock that `Seen.heard` was read from, s.
        idle_limit_s: longest silence of a rank that is in no timed work.
    """
    causes = []
    for seen in table:
        sign = seen.sign
        if sign.error:
            causes.append(Cause(5 if sign.echo else 1, f"rank {seen.rank}: {sign.error}"))
        elif sign.signal and not table[0].sign.signal:  # one rank, not the whole job
            causes.append(Cause(2, f"{seen.name} was told to end by {sign.signal}"))
        elif seen.gone:
            continue
        elif seen.lost:
            causes.append(
                Cause(
                    2,
                    f"{seen.name} died{_during(sign)}: killed by a signal, or it crashed; "
                    "often the host is out of memory, above all while loading",
                )
            )
        elif now - seen.heard > (sign.limit_s if math.isfinite(sign.limit_s) else idle_limit_s):
            causes.append(Cause(4, _silent(seen, now)))
    causes += [cause for cause in (_left(table, now), _stuck(table, now)) if cause]
    return min(causes, key=lambda cause: cause.weight, default=None)


def describe(error: BaseException) -> str:
    """What to print of an error: a UserError's sentence, or the end of anything else's
    traceback."""
    if isinstance(error, UserError):
        return str(error)
    trace = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {error}\n{trace[-ERROR_CHARS:]}".rstrip()


def is_echo(error: BaseException) -> bool:
    """Whether an error only says that another rank went away: then that rank's own story is the one
    to tell."""
    return isinstance(error, (dist.DistError, ConnectionError)) or (
        isinstance(error, RuntimeError) and ECHO.search(str(error)) is not None
    )


def silent(table: list[Seen], now: float) -> list[Seen]:
    """Ranks that neither answer nor have ended: stopped processes, which only SIGKILL reaches."""
    return [
        seen for seen in table if not seen.gone and not seen.lost and now - seen.heard > MISSED_S
    ]


def _left(table: list[Seen], now: float) -> Cause | None:
    """A rank went home while another one still counts on it."""
    left = [seen for seen in table if seen.sign.left]
    for other in table:
        patience_s = min(LEFT_GRACE_S, other.sign.limit_s)
        if (
            left
            and not other.gone
            and (
                other.sign.echo
                or (other.busy_s(now) > patience_s and now - left[0].heard > patience_s)
            )
        ):
            return Cause(
                3,
                f"rank {left[0].rank} has left, while rank {other.rank} was still in "
                f"{other.sign.what or 'a collective'}: every rank must make every call",
            )
    return None


def _stuck(table: list[Seen], now: float) -> Cause | None:
    """Somebody is over the limit of its work; the one to name is the rank that all others wait
    for."""
    here = [seen for seen in table if not seen.gone]
    late = [seen for seen in here if seen.busy_s(now) > seen.sign.limit_s]
    if not late:
        return None
    waiting = max(late, key=lambda seen: seen.sign.collectives)
    culprit = min(here, key=lambda seen: seen.sign.collectives)
    took = f"{waiting.busy_s(now):.0f} s (limit {waiting.sign.limit_s:g} s)"
    place = f"; it is at {culprit.sign.where}" if culprit.sign.where else ""
    if culprit.sign.collectives == waiting.sign.collectives:
        return Cause(
            4,
            f"{late[0].name} has been in {late[0].sign.what} for {took}, and no rank is behind it"
            + (f"; it is at {late[0].sign.where}" if late[0].sign.where else ""),
        )
    if now - culprit.heard > MISSED_S:
        return Cause(4, _silent(culprit, now))
    if culprit.sign.call < waiting.sign.call:
        return Cause(
            4,
            f"{culprit.name} has not made call {waiting.sign.call}, in which rank {waiting.rank} "
            "has "
            f"waited for {took}: every rank must make every call{place}",
        )
    return Cause(
        4,
        f"{culprit.name} hangs{_during(culprit.sign)}: rank {waiting.rank} has waited in "
        f"{waiting.sign.what} for {took}{place}",
    )


def _silent(seen: Seen, now: float) -> str:
    return (
        f"{seen.name} has stopped answering{_during(seen.sign)}: no sign of life for "
        f"{now - seen.heard:.0f} s "
        "(stopped, out of reach, or its host is gone)"
    )


def _during(sign: Sign) -> str:
    return f" during {sign.what}" if sign.what else ""
