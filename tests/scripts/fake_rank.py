"""Stands where torchrun and its ranks do, in tests of the server: a process without torch that
answers over the real link.

    python fake_rank.py FOLDER [plan of the 1st life] [of the 2nd] ...

A plan is a word: "live"; "slow" (20 ms a step); "die:N" (killed at its Nth step); "stop:N"
(SIGSTOP); "load:N" (takes N seconds until it is ready); "never" (leaves with an error before that);
"deaf" (never connects); "bug" (ends with a traceback). The last plan holds for all later lives.
FOLDER gets a file for each life with its pid, and "child" with that of a process which it leaves
behind. Tokens are `token(seed, index, position)`, one a step; a prompt that begins with 0 ends at 4
tokens with "stop", one with 1 takes 20 ms a step.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from llama_tp.server.link import RankEnd

INFO = {
    "n_vocab": 2048,
    "max_model_len": 512,
    "max_rows": 8,
    "n_blocks": 100,
    "block_size": 16,
    "tp": 2,
    "device": "cpu",
    "dtype": "float32",
    "deterministic": True,
}


def token(seed: int, index: int, position: int) -> int:
    return 97 + (seed * 31 + index * 7 + position * position) % 26


class Row:
    def __init__(self, message: dict, index: int):
        self.id, self.index, self.params = message["id"], index, message["params"]
        outputs = message["outputs"]
        self.prompt, self.ids = message["prompt"], list(outputs[index] or ()) if outputs else []
        self.runs = not outputs or outputs[index] is not None

    def step(self) -> dict:
        new = token(self.params["seed"], self.index, len(self.prompt) + len(self.ids))
        stops = self.prompt[0] == 0 and len(self.ids) == 4
        self.ids += [] if stops else [new]
        reason = (
            "stop"
            if stops
            else "length"
            if len(self.ids) == (self.params["max_tokens"] or 500)
            else None
        )
        k = self.params["logprobs"]
        logprobs = (
            []
            if stops or k is None
            else [[new, -0.5, [[new, -0.5], *([97 + i, -1.5] for i in range(1, k))]]]
        )
        self.runs = reason is None
        return {
            "id": self.id,
            "index": self.index,
            "ids": [] if stops else [new],
            "text": "" if stops else chr(new),
            "logprobs": logprobs,
            "finish_reason": reason,
            "error": None,
        }


def serve(link: RankEnd, plan: str) -> None:
    how, _, at = plan.partition(":")
    rows: list[Row] = []
    n_steps = n_prompt = 0
    time.sleep(float(at) if how == "load" else 0)
    link.send({"is": "ready", **INFO})
    while (messages := link.take(wait=not rows)) is not None:
        deltas = []
        for message in messages:
            if message["do"] == "abort":
                rows = [row for row in rows if row.id != message["id"]]
            else:
                new = [Row(message, index) for index in range(message["params"]["n"])]
                rows += [row for row in new if row.runs]
                n_prompt += len(message["prompt"])
                if message["params"]["prompt_logprobs"] is not None:
                    scores = [[one, -1.5, [[one, -1.5]]] for one in message["prompt"][1:]]
                    link.send({"is": "scores", "id": message["id"], "scores": [None, *scores]})
        n_steps += 1
        if str(n_steps) == at:
            os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)
        running = rows[: INFO["max_rows"]]
        if plan == "slow" or any(row.prompt[0] == 1 for row in running):
            time.sleep(0.02)
        deltas = [row.step() for row in running]
        rows = [row for row in rows if row.runs]
        link.send(
            {
                "is": "step",
                "deltas": deltas,
                "refused": {},
                "begun": [],
                "step_s": 0.001,
                "stats": {
                    "n_running": min(len(rows), 8),
                    "n_waiting": max(0, len(rows) - 8),
                    "kv_use": len(rows) / 100,
                    "n_preemptions": 0,
                    "prefix_hit_tokens": 0,
                    "n_steps": n_steps,
                    "prefill_tokens": n_prompt,
                    "prefill_s": 0.1,
                    "decode_tokens": len(running),
                    "decode_s": 0.1,
                },
            }
        )


folder, plans = Path(sys.argv[1]), sys.argv[2:]
life = len(list(folder.glob("life*")))
(folder / f"life{life}").write_text(str(os.getpid()))
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
)
(folder / "child").write_text(str(child.pid))
plan = plans[min(life, len(plans) - 1)]
if plan == "never":
    print("loading", file=sys.stderr)
    sys.exit("error: the weights are damaged - found none - download them again")
if plan == "bug":
    raise RuntimeError("a bug of ours")
if plan == "deaf":
    time.sleep(600)
serve(RankEnd(os.environ["LLAMA_TP_LINK"]), plan)
