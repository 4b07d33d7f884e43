"""Running servers for tests: `python -m llama_tp.serve` with real ranks, or with fake ones behind
the real application."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.ranks import PATIENCE_S, ROOT, end_job, marked

DEMO, SCRIPTS = ROOT / "checkpoints" / "demo", ROOT / "tests" / "scripts"


class Server:
    """A running `serve`: `.url`, `.stderr`, `.get(path)`, `.post(path, body)`, `.ranks()`; all of
    it ends with the test."""

    def __init__(self, process: subprocess.Popen, log: Path, mark: str):
        self.process, self.log, self.mark, self.url = process, log, mark, ""

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.stderr:
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.stderr}"
            assert time.monotonic() < deadline, f"no {text!r} after {timeout} s:\n{self.stderr}"
            time.sleep(0.05)

    def wait_listening(self) -> None:
        self.wait_for("listening on ")
        self.url = self.stderr.partition("listening on ")[2].split()[0]

    def wait_ready(self, timeout: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout
        while self.get("/health")[0] != 200:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, self.stderr
            time.sleep(0.05)

    def request(
        self, path: str, data: bytes | None, headers: dict[str, str]
    ) -> tuple[int, dict, bytes]:
        """(status, headers, body)."""
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
                return reply.status, dict(reply.headers), reply.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def get(self, path: str, **headers: str) -> tuple[int, dict, bytes]:
        return self.request(path, None, headers)

    def get_json(self, path: str, **headers: str) -> tuple[int, dict]:
        """(status, the JSON it answers with)."""
        status, _, text = self.request(path, None, headers)
        return status, json.loads(text)

    def post(self, path: str, body: object, **headers: str) -> tuple[int, dict]:
        """(status, the JSON it answers with)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, text = self.request(path, data, {"Content-Type": "application/json", **headers})
        return status, json.loads(text)

    def wait_idle(self) -> dict:
        """What /load says, once no request is left."""
        while (
            (load := json.loads(self.get("/load")[2]))["server_load"]
            or load["running"]
            or load["waiting"]
        ):
            time.sleep(0.02)
        return load

    def n_aborted(self) -> int:
        """The samples that were given up because their client had gone."""
        page = self.get("/metrics")[2].decode()
        return sum(
            int(float(line.split()[-1]))
            for line in page.splitlines()
            if line.startswith('llama_tp:request_success_total{finished_reason="abort"')
        )

    def failures(self) -> list[str]:
        """What its books say of replies of 500 and more, but for /health, which says 503 while it
        loads."""
        lines = [
            line
            for line in self.get("/metrics")[2].decode().splitlines()
            if line.startswith("http_requests_total{")
        ]
        assert lines
        return [line for line in lines if 'status="5' in line and 'handler="/health"' not in line]

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in rank order."""
        found = {}
        for pid in marked(f"LLAMA_TP_TEST_JOB={self.mark}"):
            with contextlib.suppress(OSError):
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(line[5:]): pid for line in env if line.startswith(b"RANK=")}
        return [found[rank] for rank in sorted(found)]

    def end(self, number: int = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
        """Ends it by a signal; its exit code, once nothing of it is left."""
        self.process.send_signal(number)
        code = self.process.wait(timeout)
        assert not (left := marked(f"LLAMA_TP_TEST_JOB={self.mark}")), (
            f"left over: {left}\n{self.stderr}"
        )
        return code


@contextlib.contextmanager
def serving(
    *words: str, ready: bool = True, env: dict[str, str] | None = None, ckpt_dir: Path = DEMO
):
    """`python -m llama_tp.serve --ckpt_dir ... --port 0` with more words; killed, ranks and all, at
    the end."""
    words = [
        "-m",
        "llama_tp.serve",
        "--ckpt_dir",
        str(ckpt_dir),
        "--port",
        "0",
        "--device",
        "cpu",
        *words,
    ]
    with started(words, env or {}, ready) as server:
        yield server


@contextlib.contextmanager
def pretending(*plans: str, ready: bool = True, **options):
    """The real server in front of fake ranks with these plans (scripts/fake_rank.py), with
    ServerOptions; up in a second."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [sys.executable, str(SCRIPTS / "fake_rank.py"), folder, *plans]
        words = [str(SCRIPTS / "fake_server.py"), json.dumps(options), *ranks]
        with started(words, {}, ready) as server:
            yield server


@contextlib.contextmanager
def started(words: list[str], env: dict[str, str], ready: bool):
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        path = os.pathsep.join(
            filter(None, [env.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH")])
        )
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=ROOT,
                env={
                    **os.environ,
                    "LLAMA_TP_THREADS": "1",
                    **env,
                    "PYTHONPATH": path,
                    "LLAMA_TP_TEST_JOB": mark,
                },
            )
        server = Server(process, log, mark)
        try:
            if ready:
                server.wait_listening()
                server.wait_ready()
            yield server
        finally:
            end_job(process, f"LLAMA_TP_TEST_JOB={mark}")
