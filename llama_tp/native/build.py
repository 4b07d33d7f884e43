"""Compiles the C++ sources: `python -m llama_tp.native.build`, which `make setup` runs once.

One compiler call, some seconds, no headers but the compiler's. The result is named after all that
it depends on (sources, flags, this CPU's features), so that another machine or another version
never loads a wrong one; it is written beside the sources under a name of its own and then moved, so
that builds at the same time do no harm.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llama_tp.arch.errors import UserError

HERE = Path(__file__).parent
SOURCES = [
    HERE / name
    for name in ("interface.cpp", "kernels.cpp", "layer.cpp", "product.cpp", "shared.cpp")
]
HEADERS = [HERE / name for name in ("native.h", "vector.h")]
BUILT = HERE / "built"
# No -ffast-math: sums must keep their order, and NaN must stay NaN. -fopenmp names libgomp, and
# finds the copy that torch has loaded already, so that torch, oneDNN and these kernels share one
# pool of threads.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-fPIC",
    "-shared",
]
# By LLAMA_TP_SANITIZE (tests/scripts/sanitize.py runs tests under each): with frames and lines in
# their reports, and not so optimised that a fault is gone.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer"]
COMPILE_S = 900  # 5 s of a free core; 25 s with a sanitizer


def sanitizer() -> str:
    """LLAMA_TP_SANITIZE: "address", "thread", or "" for the library that everybody runs. Raises
    UserError for another value."""
    name = os.environ.get("LLAMA_TP_SANITIZE", "")
    if name and name not in SANITIZERS:
        raise UserError(
            "LLAMA_TP_SANITIZE names no sanitizer", name, f"set it to {' or '.join(SANITIZERS)}"
        )
    return name


def flags() -> list[str]:
    """The compiler's."""
    name = sanitizer()
    return [*FLAGS, *SANITIZED, *SANITIZERS[name]] if name else FLAGS


@functools.cache
def path() -> Path:
    """Where the library for these sources, flags and this machine is, or would be."""
    digest = hashlib.sha256(repr((flags(), platform.machine(), cpu_features())).encode())
    for source in [*SOURCES, *HEADERS]:
        digest.update(source.read_bytes())
    return BUILT / f"{sanitizer() or 'native'}-{digest.hexdigest()[:16]}.so"


def cpu_features() -> str:
    """What -march=native looks at, as Linux tells it; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), ""
    )


def build() -> Path:
    """Compiles the library unless it is there. Raises UserError, with the compiler's words, if it
    cannot."""
    target, compiler = (
        path(),
        os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"),
    )
    if target.exists():
        return target
    if compiler is None:
        raise UserError(
            "there is no C++ compiler",
            "looked for CXX, g++ and clang++",
            "install g++; llama_tp runs without, slower",
        )
    try:
        BUILT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILT) as folder:
            made = Path(folder) / target.name
            subprocess.run(
                [compiler, *flags(), *map(str, SOURCES), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                timeout=COMPILE_S,
            )
            made.replace(target)
    except subprocess.SubprocessError as error:
        told = getattr(error, "stderr", None) or str(error)  # bytes, if the time was up
        words = (told.decode(errors="replace") if isinstance(told, bytes) else told).splitlines()
        raise UserError(
            "the C++ parts do not compile",
            "; ".join(words[:5]),
            "llama_tp runs without, slower; g++ 12 is known to work",
        ) from None
    except OSError as error:
        raise UserError(
            f"the C++ parts cannot be written to {BUILT}", str(error), "make the folder writable"
        ) from None
    for old in BUILT.glob(f"{sanitizer() or 'native'}-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    try:
        print(f"native: {build().name}", file=sys.stderr)
    except UserError as reason:
        print(f"note: {reason}", file=sys.stderr)
