"""Every call of the modern API, on every rank; each rank writes what it got to OUT.rank as JSON."""

import json
import os
import sys
import time
from dataclasses import asdict

from llama_tp import Llama, SamplingParams, UserError

ckpt_dir, out = sys.argv[1:]
llm = Llama.build(ckpt_dir, max_seq_len=128, max_batch_size=3, step_timeout=3, device="cpu")
rank = int(os.environ["RANK"])
got = {}
greedy = SamplingParams(max_tokens=6, temperature=0)
got["one"] = asdict(llm.complete("ROMEO:", greedy))
got["ids"] = asdict(llm.complete(llm.tokenizer.encode("ROMEO:", bos=True), greedy))
got["several"] = [
    asdict(each)
    for each in llm.complete(
        ["A", "B"],
        [
            SamplingParams(max_tokens=3, n=2, seed=1, logprobs=2),
            SamplingParams(max_tokens=4, temperature=0),
        ],
    )
]
got["chat"] = [
    asdict(each)
    for each in llm.chat([[{"role": "user", "content": text}] for text in ("hark", "ho")], greedy)
]
got["stream"] = [each.text for each in llm.stream("ROMEO:", greedy)]
for _ in llm.stream("ROMEO:", SamplingParams(max_tokens=50)):
    break  # left early: the next call must still work
for wrong in (
    lambda: llm.complete("x" * 1000),
    lambda: llm.complete("x", [greedy, greedy]),
    lambda: llm.chat([{"role": "nobody", "content": ""}]),
):
    try:
        wrong()
    except UserError as error:
        got.setdefault("errors", []).append(str(error))
if rank == 0:
    time.sleep(7)  # user code may take longer than any timeout
got["after"] = asdict(llm.complete("ROMEO:", greedy))
print("said once")
with open(f"{out}.{rank}", "w") as f:
    json.dump(got, f)
