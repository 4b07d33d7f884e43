"""From the command to the first token: what loading costs beside reading the same bytes, and what
is left."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llama_tp.benchmarks.latency import batch_of, run
from llama_tp.engine.engine import Engine

HEADER = ["imports s", "load s", "reading alone s", "load / reading", "first token s", "in all s"]


def process_age_s() -> float:
    """Seconds since this process began (Linux), else since Python did."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.process_time()


def startup(
    engine: Engine, files: list[str], begun_s: float, built_s: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Driver: -> (table row under HEADER, JSON).

    files: the checkpoint's weight files, read again into fresh memory for comparison (the cache is
        warm by then).
    begun_s, built_s: the process's age when the engine began to be built, and when it was.
    """
    first = run(engine, batch_of(engine, 1, min(128, engine.scheduler.max_len - 1), 1, "first"))
    age_s = process_age_s()
    read_s = _read_s(files)
    load_s = built_s - begun_s
    row = [
        f"{begun_s:.2f}",
        f"{load_s:.2f}",
        f"{read_s:.2f}",
        f"{load_s / read_s:.2f}",
        f"{first.first_s:.2f}",
        f"{age_s:.2f}",
    ]
    return [dict(zip(HEADER, row))], {
        "import_s": begun_s,
        "load_s": load_s,
        "read_s": read_s,
        "first_token_s": first.first_s,
        "process_to_first_token_s": age_s,
    }


def _read_s(paths: list[str]) -> float:
    """Seconds to read the files into fresh memory, in a process of its own that keeps all of it:
    pages used twice would cost a fraction. The second pass counts: in the first, a virtual machine
    may have to get its memory from the host (0.35 GB/s here, against 1-2)."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


READ = """
import mmap, os, sys, time
for _ in range(2):
    started, kept = time.perf_counter(), []
    for path in sys.argv[1:]:
        kept.append(mmap.mmap(-1, os.path.getsize(path)))
        with open(path, "rb", buffering=0) as f, memoryview(kept[-1]) as memory:
            at = 0
            while n := f.readinto(memory[at:at + (1 << 26)]):
                at += n
    read_s = time.perf_counter() - started
    while kept:
        kept.pop().close()
print(read_s)
"""
