"""Runs the tests of the C++ parts with a library that watches itself: python
tests/scripts/sanitize.py address|thread [pytest's arguments]

address: AddressSanitizer and UndefinedBehaviorSanitizer. Every access of the library's own code is
checked, torch's and numpy's memory included; leaks are not (Python never frees all).

thread: ThreadSanitizer. It sees the threads of one process: the parallel loops, and ranks that are
threads (tests/native/test_shared.py); the sides of an exchange between processes it sees one at a
time. It must know the OpenMP runtime. GCC's libgomp it does not: loops run in LLVM's libomp, with
libarcher, which come with Debian's libomp-dev. They are looked for in LD_LIBRARY_PATH and in
/usr/lib/llvm-*/lib. Without them loops are not watched, which is said, and the tests that need
several threads in a loop are left out.

A fault is planted first, and must be found.
"""

import glob
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = [  # what calls the library; several OpenMP threads in the first of them
    "tests/native/test_threads.py",
    "tests/native",
    "tests/parallel/test_shared_memory.py",
    "tests/backends/test_native.py",
    "tests/backends/test_linear.py",
    "tests/backends/test_layers.py",
]
WITHOUT_LOOPS = ["tests/native", "tests/parallel/test_shared_memory.py"]
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # torch and Python are not instrumented: what they do among themselves is their affair
    "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
}
FOUND = {"address": "ERROR: AddressSanitizer", "thread": "data race"}
PLANTED = {
    "address": """
x, out = torch.ones(64), torch.ones(8)                  # 32 floats are written
load().silu_mul_fp32(x.data_ptr(), out.data_ptr(), 1, 32)
""",
    "thread": """
import threading                                        # ctypes lets both into the library at once
x, delta, weight, out = torch.ones(4, 1 << 20)
arguments = [t.data_ptr() for t in (x, delta, weight)] + [1e-5, out.data_ptr(), 1, 1 << 20]
both = [threading.Thread(target=load().add_norm_fp32, args=arguments) for _ in range(2)]
for thread in both: thread.start()
for thread in both: thread.join()
""",
}


def library(name: str) -> str:
    """A runtime library's path, as the compiler knows it."""
    compiler = os.environ.get("CXX", "g++")
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"error: {compiler} has no {name} - install it (Debian: with gcc)")
    return path


def openmp() -> tuple[str, str] | None:
    """LLVM's OpenMP runtime, and the tool that tells ThreadSanitizer of its barriers."""
    given = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    for folder in [*given, *sorted(glob.glob("/usr/lib/llvm-*/lib"), reverse=True)]:
        runtime, tool = (os.path.join(folder, name) for name in ("libomp.so.5", "libarcher.so"))
        if os.path.exists(runtime) and os.path.exists(tool):
            return runtime, tool
    return None


def environment(name: str) -> dict[str, str]:
    """Of a Python that loads the watched library. The runtime must come first, and before libstdc++
    throws, AddressSanitizer must have seen it."""
    preload = [library(RUNTIMES[name])]
    env = os.environ | OPTIONS | {"LLAMA_TP_SANITIZE": name, "PYTHONPATH": str(ROOT)}
    if name == "address":
        preload.append(library("libstdc++.so.6"))
    elif found := openmp():
        preload.append(found[0])
        env["OMP_TOOL_LIBRARIES"] = found[1]
    return env | {"LD_PRELOAD": " ".join(preload)}


def plant(name: str, env: dict[str, str]) -> None:
    """Ends the script unless the sanitizer finds a fault."""
    code = "import torch\nfrom llama_tp.native.library import load\n" + PLANTED[name]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if done.returncode == 0 or FOUND[name] not in done.stderr:
        raise SystemExit(f"error: a planted fault was not found\n{done.stdout}{done.stderr}")
    print(f"{name}: a planted fault is found: {FOUND[name]}", flush=True)


def main(name: str, *arguments: str) -> int:
    build = os.environ | {"LLAMA_TP_SANITIZE": name, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "llama_tp.native.build"], env=build, check=True, cwd=ROOT)
    env, tests = environment(name), TESTS
    if name == "thread" and "OMP_TOOL_LIBRARIES" not in env:
        print("thread: no libomp with libarcher here (Debian: libomp-dev): loops are not watched")
        tests = [*WITHOUT_LOOPS, f"--ignore={TESTS[0]}"]
    plant(name, env)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:faulthandler"]
    return subprocess.run([*command, *(arguments or tests)], env=env, cwd=ROOT).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in RUNTIMES:
        raise SystemExit(__doc__)
    sys.exit(main(*sys.argv[1:]))
