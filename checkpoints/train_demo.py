"""Trains the demo model: a byte-level BPE and a small Llama on one text file, written as a Meta
checkpoint in shards.

    python checkpoints/train_demo.py --data some_text.txt --out checkpoints/demo

A script, not a room: the model below is the plainest Llama that trains (no KV cache, no ranks).
From llama_tp it takes only the config and the writer of shards. The text is plays: speeches
separated by an empty line, each beginning with "NAME:". The last tenth is held out, also from the
tokenizer.
"""

import argparse
import base64
import json
import math
import os
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

from llama_tp.arch.config import ModelConfig, from_params
from llama_tp.checkpoint.save import save_meta

# Llama 3's way to cut text into words before merging (the pattern is part of the format:
# llama-models `tokenizer.py`).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIALS = 256  # implicit after the merges; the first is <|begin_of_text|>
IGNORED = -100  # target of padding


# ------------------------------------------------------------------------------------ the tokenizer


def train_bpe(text: str, n_merges: int) -> list[bytes]:
    """Tokens in rank order: the 256 bytes by value, then up to `n_merges` merges, most frequent
    pair first.

    No merge joins a line break with anything but line breaks: a prompt that ends in "ROMEO:" then
    has the same ids as the "ROMEO:" of the text, where a break follows. Ties go to the smaller pair
    of ids, so the result is one.
    """
    words = Counter(
        piece for word in regex.findall(SPLIT, text) for piece in regex.findall(r"\n+|[^\n]+", word)
    )
    spelled = [list(word.encode()) for word in words]
    counts = list(words.values())
    tokens = [bytes([value]) for value in range(256)]
    pairs, where = Counter(), defaultdict(set)  # pair -> occurrences, pair -> words that have it
    for w, ids in enumerate(spelled):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += counts[w]
            where[pair].add(w)
    for _ in range(n_merges):
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]), default=None)
        if best is None or pairs[best] < 2:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for w in where.pop(best):
            for pair in zip(spelled[w], spelled[w][1:]):
                pairs[pair] -= counts[w]
            shorter = []
            for i in spelled[w]:
                shorter.append(i)
                if tuple(shorter[-2:]) == best:
                    shorter[-2:] = [len(tokens) - 1]
            spelled[w] = shorter
            for pair in zip(spelled[w], spelled[w][1:]):
                pairs[pair] += counts[w]
                where[pair].add(w)
        del pairs[best]
    return tokens


def write_tokenizer(tokens: list[bytes], path: Path) -> tiktoken.Encoding:
    """Meta's tokenizer.model: a line "base64 rank" a token, no specials. Returns the encoding read
    from that file."""
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    )
    lines = (line.split() for line in path.read_bytes().splitlines())
    return tiktoken.Encoding(
        "demo",
        pat_str=SPLIT,
        mergeable_ranks={base64.b64decode(b): int(r) for b, r in lines},
        special_tokens={},
    )


# ---------------------------------------------------------------------------------------- the model


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns Meta's adjacent pairs (2i, 2i+1) of x (B, T, heads, E)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, E/2)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, E/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, E = config.dim, config.head_dim
        self.head_dim, self.groups = E, config.n_heads // config.n_kv_heads
        self.wq, self.wo = (
            nn.Linear(D, config.n_heads * E, bias=False),
            nn.Linear(config.n_heads * E, D, bias=False),
        )
        self.wk, self.wv = (nn.Linear(D, config.n_kv_heads * E, bias=False) for _ in range(2))

    def forward(self, x, cos, sin):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, T, H or K, E)
        k, v = (t.repeat_interleave(self.groups, dim=2) for t in (k, v))  # (B, T, H, E)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.wo(y.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.dim, config.ffn_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, dropout: float):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cos, sin):
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class Llama(nn.Module):
    """Module names are Meta's, so that the state dict has the checkpoint's names."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0):
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        freqs = config.rope_theta ** (
            -torch.arange(0, config.head_dim, 2).float() / config.head_dim
        )
        angles = torch.outer(torch.arange(config.max_context).float(), freqs)  # (max_context, E/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # these add to the residual, 2 a layer
                last = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layers) if last else 0.02)

    def forward(self, ids, targets=None, reduction="mean"):
        """ids (B, T) -> logits (B, T, V), or with targets (B, T) their cross entropy in nats."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]  # (T, E/2)
        x = self.dropout(self.tok_embeddings(ids))  # (B, T, D)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.output(self.norm(x)).float()  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
        )


# ------------------------------------------------------------------------------ windows of the text


def speech_starts(ids: list[int], tokens: list[bytes]) -> list[int]:
    """Where a speech begins: at 0 and after every empty line."""
    return [0] + [i + 1 for i, t in enumerate(ids[:-1]) if tokens[t].endswith(b"\n\n")]


def batches(ids: torch.Tensor, starts: torch.Tensor, bos: int, batch: int, length: int, seed: int):
    """Endless (inputs, targets), each (batch, length). Half of the rows begin with BOS and a
    speech, as prompts do; the others begin anywhere, so that the 1 MB gives as many different
    windows as it can."""
    draw = torch.Generator().manual_seed(seed)
    starts = starts[starts <= len(ids) - length]
    while True:
        rows = []
        for i in range(batch):
            if i % 2:
                at = int(starts[torch.randint(len(starts), (), generator=draw)])
                rows.append(torch.cat((torch.tensor([bos]), ids[at : at + length])))
            else:
                at = int(torch.randint(len(ids) - length, (), generator=draw))
                rows.append(ids[at : at + length + 1])
        rows = torch.stack(rows)  # (batch, length + 1)
        yield rows[:, :-1], rows[:, 1:]


def held_out_windows(
    ids: torch.Tensor, starts: list[int], bos: int, batch: int, length: int
) -> list:
    """Batches that score every held-out token exactly once. A window is BOS and then whole
    speeches, as many as fit."""
    rows, at = [], 0
    while at < len(ids):
        full = min(at + length, len(ids))
        end = full if full == len(ids) else max((s for s in starts if at < s <= full), default=full)
        inputs, targets = torch.full((length,), bos), torch.full((length,), IGNORED)
        inputs[1 : end - at] = ids[at : end - 1]
        targets[: end - at] = ids[at:end]
        rows.append((inputs, targets))
        at = end
    return [tuple(map(torch.stack, zip(*rows[i : i + batch]))) for i in range(0, len(rows), batch)]


# --------------------------------------------------------------------------------------- the output


def write_weights(
    out: Path, config: ModelConfig, weights: dict[str, torch.Tensor], mp: int
) -> None:
    """consolidated.NN.pth x mp in bf16. Each file is replaced when the new one is whole, so that a
    run that is
    stopped leaves the best so far; `save_meta`'s params.json gives way to ours, which has Meta's
    own keys."""
    with tempfile.TemporaryDirectory(dir=out) as new:
        save_meta(
            new, config, {name: weight.to(torch.bfloat16) for name, weight in weights.items()}, mp
        )
        for path in Path(new).glob("consolidated.*.pth"):
            os.replace(path, out / path.name)


@torch.no_grad()
def sample(
    model: Llama, encoding, bos: int, prompt: str, n_tokens: int, temperature=0.8, seed=1
) -> str:
    """Plain sampling without a cache; at most `max_context` tokens. Specials, which no text has,
    are never drawn."""
    model.eval()
    draw = torch.Generator().manual_seed(seed)
    ids = [bos] + encoding.encode(prompt)
    for _ in range(min(n_tokens, len(model.cos) - len(ids))):
        logits = model(torch.tensor([ids]))[0, -1, :bos] / temperature
        ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=draw)))
    return encoding.decode(ids[1:])


@torch.no_grad()
def held_out_loss(model: Llama, windows: list, bf16: bool) -> float:
    """Sum of nats over all held-out tokens."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        total = sum(float(model(inputs, targets, "sum")) for inputs, targets in windows)
    model.train()
    return total


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warmup over 100 steps, then a cosine down to a twentieth."""
    done = max(0, step - 100) / max(1, args.steps - 100)
    return args.lr * min(1, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model on a text of plays.")
    parser.add_argument(
        "--data", type=Path, required=True, help="UTF-8 text; its last tenth is held out"
    )
    parser.add_argument("--out", type=Path, default=Path("checkpoints/demo"))
    for name, default in (
        ("merges", 1000),
        ("dim", 256),
        ("layers", 4),
        ("heads", 8),
        ("kv-heads", 4),
        ("context", 512),
        ("shards", 2),
        ("steps", 2400),
        ("batch", 8),
        ("every", 200),
        ("patience", 4),
        ("threads", 2),
        ("seed", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lr", 2e-3), ("dropout", 0.25), ("decay", 0.2)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--prompt", default="ROMEO:", help="what the sample at the end begins with")
    parser.add_argument(
        "--bf16", action="store_true", help="autocast; faster where the CPU has AVX512-BF16 or AMX"
    )
    return parser.parse_args()


def main() -> None:
    args = flags()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    text = args.data.read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) * 9 // 10) + 2
    tokens = train_bpe(text[:cut], args.merges)
    encoding, bos = write_tokenizer(tokens, args.out / "tokenizer.model"), len(tokens)
    train, held = encoding.encode(text[:cut]), encoding.encode(text[cut:])
    if encoding.decode(train + held) != text:
        raise SystemExit("the tokenizer does not give the text back")
    held_bytes = len(text[cut:].encode())

    def loss_text(nats: float) -> str:
        bits = nats / math.log(2)
        return f"{nats / len(held):.4f} nats a token, {bits / held_bytes:.4f} bits a byte"

    print(
        f"{len(tokens)} kinds of tokens; {len(train)} to train, {len(held)} held out ({held_bytes} "
        "bytes)"
    )

    params = {
        "dim": args.dim,
        "ffn_dim_multiplier": 1.0,
        "multiple_of": 64,
        "n_heads": args.heads,
        "n_kv_heads": args.kv_heads,
        "n_layers": args.layers,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "use_scaled_rope": False,
        "vocab_size": len(tokens) + N_SPECIALS,
        "max_context": args.context,
    }
    (args.out / "params.json").write_text(json.dumps(params, indent=2) + "\n")
    config = from_params(params)
    model = Llama(config, args.dropout)
    print(f"{config.n_params / 1e6:.2f} M parameters, ffn {config.ffn_dim}", flush=True)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == dims], "weight_decay": decay}
        for dims, decay in ((2, args.decay), (1, 0.0))
    ]  # norms do not decay
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    windows = held_out_windows(
        torch.tensor(held), speech_starts(held, tokens), bos, args.batch, args.context
    )
    rows = batches(
        torch.tensor(train),
        torch.tensor(speech_starts(train, tokens)),
        bos,
        args.batch,
        args.context,
        args.seed,
    )
    best, best_step, began, running = math.inf, 0, time.monotonic(), 0.0
    for step in range(1, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(*next(rows))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += float(loss.detach())
        if step % args.every and step != args.steps:
            continue
        nats = held_out_loss(model, windows, args.bf16)
        if nats < best:
            best, best_step = nats, step
            kept = {name: weight.clone() for name, weight in model.state_dict().items()}
            write_weights(args.out, config, kept, args.shards)
        print(
            f"step {step:5d}  train {running / ((step - 1) % args.every + 1):.3f}  held out "
            f"{loss_text(nats)}  "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        running = 0.0
        if step - best_step >= args.patience * args.every:
            print(f"no better for {args.patience} looks: stopped")
            break
    print(f"kept step {best_step}: {loss_text(best)}")
    model.load_state_dict(kept)
    print(sample(model, encoding, bos, args.prompt, 300))


if __name__ == "__main__":
    main()
