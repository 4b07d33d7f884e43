"""Tokens a second with a form and without, at 1 and 32 rows: PYTHONPATH=TREE python form_speed.py
[CKPT_DIR [TOKENS]], in turns for two trees."""

import statistics
import sys
import time
from pathlib import Path

from llama_tp.arch.options import EngineOptions
from llama_tp.engine.build import build
from llama_tp.engine.request import Request
from llama_tp.sampling.params import SamplingParams
from llama_tp.text.grammar import regex

CKPT_DIR = (
    sys.argv[1]
    if len(sys.argv) > 1
    else str(Path(__file__).resolve().parents[2] / "checkpoints" / "demo")
)
N_TOKENS = int(sys.argv[2]) if len(sys.argv) > 2 else 100
N_ROUNDS = 5

engine = build(
    EngineOptions(CKPT_DIR, max_batch_size=32, max_seq_len=512, device="cpu", quiet=True)
)
if not engine.is_driver:
    engine.follow()
    sys.exit()
for with_form in (True, False):
    for n_rows in (1, 32):
        rates = []
        for turn in range(N_ROUNDS + 1):  # the first one starts what has to be started
            form = regex(r"([A-Za-z',;.:!?]{1,14}[ \n]){300,}") if with_form else None
            params = SamplingParams(
                temperature=0.8, top_k=40, seed=1, max_tokens=N_TOKENS, form=form
            )
            for i in range(n_rows):
                engine.submit(
                    Request(f"{turn}-{i}", engine.tokenizer.encode(f"ROMEO {i}:", bos=True), params)
                )
            n_tokens, started = 0, 0.0
            while engine.has_work:
                deltas = engine.step()
                if started:
                    n_tokens += sum(len(delta.ids) for delta in deltas)
                elif len(deltas) == n_rows:  # all of them decode
                    started = time.perf_counter()
            rates.append(n_tokens / (time.perf_counter() - started))
        print(
            f"{'a form' if with_form else 'free'}, {n_rows} rows: "
            f"{statistics.median(rates[1:]):.1f} tok/s",
            flush=True,
        )
engine.dismiss()
engine.close()
