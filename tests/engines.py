"""Engines for tests: a real worker, scheduler and sampler on random weights, without files,
launcher or watch."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama_tp.arch.config import ModelConfig
from llama_tp.arch.shard_map import Shard, ShardMap
from llama_tp.arch.weights import table
from llama_tp.engine.blocks import BlockManager
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.scheduler import Scheduler
from llama_tp.engine.worker import Worker
from llama_tp.model.build import from_weights, plain_backends
from llama_tp.sampling.numerators import SoftmaxNumerators
from llama_tp.sampling.params import SamplingParams
from llama_tp.text.token_table import Tokenizer
from llama_tp.text.tokenizer import open_tokenizer
from tests import reference


class NoWatch:
    """Stands where health's Watch does, for ranks that a test pool already guards."""

    @contextlib.contextmanager
    def busy(self, what: str):
        yield


class GatheredWorker(Worker):
    """Samples every row from gathered logits: for tests that look at these."""

    def _sample(self, mode, rows, hidden, callbacks, masks):
        return self._choose(rows, hidden, callbacks)


class OnDevice(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: values that come to the host, or shapes that depend on
    them."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.overloadpacket.__name__ not in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
        ), op
        return op(*args, **(kwargs or {}))


class Again:
    """A Record that captures nothing: what would be captured runs as often as asked, the first time
    guarded. Of the warm-ups only the first, and largest, is done, since 32 of them are a second for
    every engine; `Counting` does all."""

    guard, warm = OnDevice, False

    def warm_up(self, body):
        if not self.warm:
            body()
        self.warm = True

    def capture(self, body):
        guards = [self.guard()]

        def replay():
            with guards.pop() if guards else contextlib.nullcontext():
                body()

        return replay

    def release(self):
        pass


class Counting(Again):
    """Knows what it captured and how often that was replayed; fails when told to, as a driver or a
    library can."""

    def __init__(self, fails_at: str = "", after: int = 0):
        self.n_captured, self.n_replayed, self.released, self.fails_at, self.after = (
            0,
            0,
            False,
            fails_at,
            after,
        )

    def fail(self, at: str):
        if at == self.fails_at and self.n_captured == self.after:
            raise RuntimeError(f"no {at}\nand many lines more")

    def warm_up(self, body):
        body()
        self.fail("warm-up")

    def capture(self, body):
        self.fail("capture")
        self.n_captured += 1
        again = super().capture(body)

        def replay():
            self.n_replayed += 1
            again()

        return replay

    def release(self):
        self.released = True


class Recorder(Engine):
    """An engine that keeps the logits each token was chosen from: {(request id, sample, position):
    (V,)}."""

    def _choose(self, rows, logits):
        for row, values in zip(rows, logits):
            sequence = self.scheduler.rows[row.row]
            self.seen[sequence.request.id, sequence.index, len(sequence.ids)] = values.clone()
        return super()._choose(rows, logits)


def alphabet(n_vocab: int) -> Tokenizer:
    """A tokenizer of n_vocab one-letter tokens and no stop ids."""
    return Tokenizer(
        [chr(0x100 + i).encode() for i in range(n_vocab)],
        {},
        None,
        (),
        lambda text: [ord(c) - 0x100 for c in text],
    )


def letters(folder: Path, n_vocab: int = 260) -> Tokenizer:
    """A byte a token, one that ends (256), and others without text: in a file, which the processes
    for forms can open, too."""
    alphabet = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {byte: chr(byte) for byte in alphabet}
    shown |= {
        byte: chr(256 + i)
        for i, byte in enumerate(byte for byte in range(256) if byte not in alphabet)
    }
    specials = [
        {
            "id": i,
            "content": f"<|{i}|>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in range(256, n_vocab)
    ]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": specials,
                "model": {"type": "BPE", "vocab": {shown[i]: i for i in range(256)}, "merges": []},
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
                "decoder": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            }
        )
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": 256}')
    return open_tokenizer(None, str(folder))


def shard_of(config: ModelConfig, ranks) -> Shard:
    """What this rank holds when all hold as much."""
    return ShardMap.even(config, ranks.tp).shard(ranks.rank)


def engine(
    ranks,
    config: ModelConfig,
    dtype=torch.float32,
    deterministic=False,
    weights=None,
    n_blocks=64,
    max_rows=8,
    step_tokens=512,
    prefix_cache=True,
    block_size=16,
    worker=GatheredWorker,
    fast=True,
    graphs=False,
    backends=None,
    tokenizer=None,
    record=Again,
    shard_map=None,
) -> Recorder:
    """fast: with what this machine can do, C++ kernels and shared memory; else plain torch and
    gloo. graphs: as on CUDA, decodes replayed (here: run again) and steps planned one ahead."""
    weights = weights or reference.random_weights(table(config), dtype=dtype)
    ranks = ranks if fast else replace(ranks, communicator=None, control_communicator=None)
    if backends is None and (not fast or graphs):
        shard = shard_map.shard(ranks.rank) if shard_map else shard_of(config, ranks)
        backends = plain_backends(shard, ranks, dtype, deterministic)
    model = from_weights(config, ranks, dtype, 1024, weights, deterministic, backends, shard_map)
    cache = model.backends.attention.new_cache(config.n_layers, n_blocks, block_size)
    scheduler = Scheduler(
        BlockManager(n_blocks, block_size, prefix_cache), max_rows, step_tokens, 1024
    )
    tokenizer = tokenizer or alphabet(config.vocab_size)
    run = worker(
        model,
        cache,
        max_rows,
        min(tokenizer.n_vocab, config.vocab_size),
        record() if graphs else None,
        None if fast and not graphs else SoftmaxNumerators(),
    )
    assert run.capture() is None
    out = Recorder(run, scheduler, tokenizer, ranks, NoWatch(), n_ahead=int(graphs))
    out.seen = {}
    return out


def serve(ranks, requests: list[tuple[str, list[int], dict]], arrivals: int = 99, **options):
    """Runs requests to their end on every rank, `arrivals` of them handed over before each step.

    -> on the driver ({(id, sample): ids}, {(id, sample, position): logits}, deltas), None on
      workers.
    """
    one = engine(ranks, **options)
    if not ranks.is_driver:
        one.follow()
        return None
    queue, deltas = list(requests), []
    while queue or one.has_work:
        for name, ids, params in queue[:arrivals]:
            one.submit(Request(name, ids, SamplingParams(**params)))
        queue = queue[arrivals:]
        deltas += one.step()
        one.scheduler.check_integrity()
    one.dismiss()
    assert one.scheduler.n_free_blocks == one.scheduler.blocks.n_blocks, "blocks leaked"
    tokens: dict = {}
    for delta in deltas:
        tokens.setdefault((delta.request_id, delta.index), []).extend(delta.ids)
    return tokens, one.seen, deltas
