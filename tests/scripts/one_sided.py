"""A call that only one rank makes."""

import os
import sys

from llama_tp import Llama, SamplingParams

llm = Llama.build(sys.argv[1], max_seq_len=128, step_timeout=4, device="cpu")
llm.complete("A", SamplingParams(max_tokens=2))
if os.environ["RANK"] == sys.argv[2]:
    llm.complete("B", SamplingParams(max_tokens=2))
