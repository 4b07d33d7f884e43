"""Whether this tree computes the same bits as another commit on this machine: python
tests/scripts/parity.py COMMIT [--quick]

Both trees answer the same `batch` on the same checkpoints, launch by launch, and their choices have
to be equal byte for byte: greedy tokens, seeded draws in each sampling mode, and logprobs to the
last bit. The command line is all that the script uses of the trees, so it survives any move inside
the package. Bits differ between machines, so none are kept in the repository.

Each shape is run in fp32 and bf16, at tp 1, 2 and 4, deterministic or not, with and without the C++
parts. --quick: the demo and one random shape, tp 1 and 2.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[2]
DEMO = HERE / "checkpoints" / "demo"
RANDOM_SHAPES = {  # name -> params.json; the vocabulary is the demo tokenizer's
    "gqa": {
        "dim": 128,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 2,
        "multiple_of": 64,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
    },
    "mha": {
        "dim": 96,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 4,
        "multiple_of": 40,
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
    },
}
PROMPTS = [
    "ROMEO:",
    "",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 6,
    "a b c d e f g",
]
# each of the ways in which tokens are chosen: on the shards or from gathered logits, with filters
# or without
SAMPLINGS = {
    "greedy": {"temperature": 0},
    "greedy_logprobs": {"temperature": 0, "logprobs": 5},
    "unfiltered": {"temperature": 1, "top_p": 1},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "n": 2},
    "filtered_logprobs": {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "n": 2, "logprobs": 5},
    "penalties": {
        "temperature": 0.7,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "logprobs": 5,
    },
    "flat": {"temperature": 5, "top_p": 0.99, "seed": 3},
}


def write_random(folder: Path, params: dict, seed: int) -> None:
    """A checkpoint in Meta's layout with one shard of random bf16 weights."""
    folder.mkdir(parents=True)
    vocab = json.loads((DEMO / "params.json").read_text())["vocab_size"]
    D, H, K = params["dim"], params["n_heads"], params["n_kv_heads"]
    E = D // H
    ffn = params["multiple_of"] * -(-(2 * 4 * D // 3) // params["multiple_of"])  # Meta's rule
    shapes = {"tok_embeddings": (vocab, D), "norm": (D,), "output": (vocab, D)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.{name}": shape
            for name, shape in {
                "attention_norm": (D,),
                "ffn_norm": (D,),
                "attention.wq": (H * E, D),
                "attention.wk": (K * E, D),
                "attention.wv": (K * E, D),
                "attention.wo": (D, H * E),
                "feed_forward.w1": (ffn, D),
                "feed_forward.w2": (D, ffn),
                "feed_forward.w3": (ffn, D),
            }.items()
        }
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"{name}.weight": (
            torch.randn(shape, generator=generator) * 0.05 + (len(shape) == 1)
        ).bfloat16()
        for name, shape in shapes.items()
    }
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(
        json.dumps(params | {"vocab_size": vocab, "max_context": 512})
    )
    shutil.copy(DEMO / "tokenizer.model", folder)


def requests() -> str:
    """The lines of a batch: each prompt in each sampling."""
    return "".join(
        json.dumps(
            {
                "custom_id": f"{name} {i}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "any", "prompt": prompt, "max_tokens": 16, "seed": i} | sampling,
            }
        )
        + "\n"
        for name, sampling in SAMPLINGS.items()
        for i, prompt in enumerate(PROMPTS)
    )


def answers(
    tree: Path, folder: Path, lines: Path, dtype: str, tp: int, deterministic: bool, native: bool
) -> dict[str, str]:
    """What one launch of `batch` in `tree` answers, custom_id -> its choices as JSON."""
    out = lines.with_name("out")
    command = [
        sys.executable,
        "-m",
        "llama_tp.launch",
        "--nproc_per_node",
        str(tp),
        "batch",
        "--ckpt_dir",
        str(folder),
        "--input",
        str(lines),
        "--output",
        str(out),
        "--dtype",
        dtype,
        "--device",
        "cpu",
        "--quiet",
        "--deterministic" if deterministic else "--no_deterministic",
    ]
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "LLAMA_TP_THREADS": "1",
        **({} if native else {"LLAMA_TP_NATIVE": "0"}),
    }
    run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600)
    if run.returncode:
        raise SystemExit(f"{tree}: {' '.join(command)}\n{run.stderr}")
    told = [json.loads(line) for line in out.read_text().splitlines()]
    for written in lines.parent.glob("out*"):
        written.unlink()
    return {line["custom_id"]: json.dumps(line["response"]["body"]["choices"]) for line in told}


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    words.add_argument("commit", help="what to compare with, as git knows it")
    words.add_argument("--quick", action="store_true", help="fewer shapes and ranks")
    given = words.parse_args()
    shapes, tps = (
        (["demo", "gqa"], [1, 2]) if given.quick else (["demo", *RANDOM_SHAPES], [1, 2, 4])
    )
    n_equal, different = 0, []
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary, "base")
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(base), given.commit],
            cwd=HERE,
            check=True,
            capture_output=True,
        )
        try:
            for tree in (base, HERE):
                subprocess.run(
                    [sys.executable, "-m", "llama_tp.native.build"],
                    cwd=tree,
                    env=os.environ | {"PYTHONPATH": str(tree)},
                    check=True,
                )
            lines, folders = Path(temporary, "lines"), {"demo": DEMO}
            lines.write_text(requests())
            for i, (name, params) in enumerate(RANDOM_SHAPES.items()):
                folders[name] = Path(temporary, name)
                write_random(folders[name], params, i)
            for case in itertools.product(
                shapes, ("float32", "bfloat16"), tps, (True, False), (True, False)
            ):
                theirs, ours = (
                    answers(tree, folders[case[0]], lines, *case[1:]) for tree in (base, HERE)
                )
                assert theirs and theirs.keys() == ours.keys()
                odd = [name for name in theirs if theirs[name] != ours[name]]
                n_equal += len(theirs) - len(odd)
                different += odd
                shape, dtype, tp, deterministic, native = case
                said = f"{shape}, {dtype}, tp {tp}{', deterministic' if deterministic else ''}"
                said += "" if native else ", without C++"
                print(
                    f"{said}: {len(theirs) - len(odd)} answers "
                    f"equal{f', different: {odd}' if odd else ''}",
                    flush=True,
                )
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(base)],
                cwd=HERE,
                check=True,
                capture_output=True,
            )
    print(f"parity with {given.commit}: {n_equal} answers equal, {len(different)} different")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
