"""From a checkpoint folder to an engine: the one place where all communicators meet, in the order
that
fails early.

Every rank runs this. What can be known without reading weights is checked first (layout, shapes,
tokenizer, tp, memory), so that a bad launch ends in seconds with one message.
"""

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.distributed import Store

from llama_tp.arch.errors import UserError
from llama_tp.arch.memory import Budget, counted, kv_bytes_per_token, weight_bytes, workspace_bytes
from llama_tp.arch.options import DEFAULT_SEQ_LEN, STEP_TOKENS, EngineOptions
from llama_tp.arch.shard_map import Shard, ShardMap
from llama_tp.backends.kv_cache import KVCache
from llama_tp.backends.select import Backends, fixes_rows
from llama_tp.checkpoint.hub import fetch, is_repo
from llama_tp.checkpoint.load import load
from llama_tp.checkpoint.source import Source, open_checkpoint
from llama_tp.engine.blocks import BlockManager
from llama_tp.engine.cuda_graph import CudaRecord
from llama_tp.engine.engine import Engine
from llama_tp.engine.scheduler import Scheduler
from llama_tp.engine.worker import Worker
from llama_tp.model.build import choose_backends, compile_backends
from llama_tp.model.destinations import Destinations
from llama_tp.model.llama import Transformer
from llama_tp.native.library import load as library
from llama_tp.parallel.collectives import barrier, gather_ints
from llama_tp.parallel.groups import Ranks, init_ranks
from llama_tp.parallel.health import Watch
from llama_tp.parallel.log import Progress, say, warn
from llama_tp.text.template import find_template
from llama_tp.text.token_table import Tokenizer
from llama_tp.text.tokenizer import check_vocab, open_tokenizer

PACK_BEHIND = 2  # weights read and not yet packed: each is in memory once more than in the end
MEMORY_SHARE = 0.9  # of what is free: the rest is for what no estimate sees
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}


def build(options: EngineOptions, store: Store | None = None) -> Engine:
    """Joins the other ranks, loads this rank's shard and returns its engine; `store` is the
    launch's, if it is open already. Raises UserError on a single rank; under a launcher a failure
    on any rank ends the whole job with one message (health)."""
    ranks = init_ranks(
        options.device,
        options.model_parallel_size,
        2 * max(options.step_timeout, 60.0),
        options.load_timeout,
        store,
    )
    watch = Watch(ranks, options.step_timeout, options.load_timeout)
    try:
        with watch.busy("load", options.load_timeout):
            return _build(options, ranks, watch)
    except Exception as e:
        watch.fail(e)
        raise


def _build(options: EngineOptions, ranks: Ranks, watch: Watch) -> Engine:
    started = time.perf_counter()
    _download(options.ckpt_dir, ranks)
    source = open_checkpoint(options.ckpt_dir, options.rope_factor)
    shard = ShardMap.even(source.config, ranks.tp).shard(ranks.rank)
    check_chat_template(options)
    same_everywhere(source.digest(), ranks)
    config, dtype = source.config, pick_dtype(options.dtype, source.dtype, ranks.device)
    max_seq_len = min(options.max_seq_len or DEFAULT_SEQ_LEN, config.max_context)
    step_tokens = options.max_step_tokens or STEP_TOKENS[ranks.device.type]
    deterministic = pick_mode(options.deterministic, ranks.device, dtype)
    backends = choose_backends(shard, ranks, dtype, deterministic)
    n_blocks = plan_cache(
        shard, ranks, dtype, max_seq_len, options.max_batch_size, step_tokens, backends.block_size
    )
    changed = (
        [f"stored as {str(source.dtype)[6:]}, computed in {str(dtype)[6:]}"]
        if dtype != source.dtype
        else []
    )
    for note in [
        *source.notes,
        *changed,
        *startup_warnings(options, shard, ranks, dtype, max_seq_len, backends),
    ]:
        say(note, ranks, options.quiet)
    if ranks.device.type == "cuda":
        say(
            "compiling, and later capturing decodes as CUDA graphs: at most a minute or two",
            ranks,
            options.quiet,
        )
    backends = compiled(backends, shard, ranks, dtype, deterministic)

    model = Transformer(shard, ranks, dtype, max_seq_len, deterministic, backends)
    with ThreadPoolExecutor(1) as aside:  # takes 0.6 s, most of it without the interpreter's lock
        opening = aside.submit(_tokenizer, options, source)
        load_into(model, source, shard, ranks, watch, options.quiet, unless=opening)
    tokenizer = opening.result()
    cache = backends.attention.new_cache(config.n_layers, n_blocks)
    engine = assemble(
        model,
        cache,
        options.max_batch_size,
        step_tokens,
        tokenizer,
        watch,
        options.prefix_cache,
        options.seed,
    )
    mode = f"{str(dtype)[6:]}, {backends.name} kernels{', deterministic' if deterministic else ''}"
    if engine.worker.graphs and engine.worker.graphs.captured:
        mode += f", {len(engine.worker.graphs.captured)} captured decodes"
    say(
        f"ready in {time.perf_counter() - started:.1f} s: {source.layout} checkpoint, "
        f"{counted(config.n_params)} parameters, "
        f"{ranks.tp} rank(s) on {ranks.device.type}, {mode}, KV cache for "
        f"{n_blocks * backends.block_size:,} tokens",
        ranks,
        options.quiet,
    )
    return engine


def assemble(
    model: Transformer,
    cache: KVCache,
    max_rows: int,
    step_tokens: int,
    tokenizer: Tokenizer,
    watch: Watch,
    prefix_cache: bool,
    seed: int,
) -> Engine:
    """The engine of a loaded model. On CUDA decodes are replayed from graphs and steps planned one
    ahead; on CPU, where the device is the host, neither has anything to hide."""
    on_cuda = model.ranks.device.type == "cuda"
    worker = Worker(
        model,
        cache,
        max_rows,
        min(tokenizer.n_vocab, model.config.vocab_size),
        CudaRecord() if on_cuda else None,
    )
    if why := worker.capture():
        warn(
            "decodes cannot be captured as CUDA graphs on this rank, so that all ranks launch "
            f"them one by one, slower: {why}",
            model.ranks,
        )
    blocks = BlockManager(cache.n_blocks, cache.block_size, prefix_cache)
    scheduler = Scheduler(
        blocks, max_rows, step_tokens, model.n_positions, max_context=model.config.max_context
    )
    return Engine(worker, scheduler, tokenizer, model.ranks, watch, seed, n_ahead=int(on_cuda))


def _tokenizer(options: EngineOptions, source: Source) -> Tokenizer:
    tokenizer = open_tokenizer(options.tokenizer_path, source.folder)
    check_vocab(tokenizer, source.config.vocab_size)
    return tokenizer


def _download(ckpt_dir: str, ranks: Ranks) -> None:
    """A hub name is downloaded by the first rank of each node while the others wait; a folder is
    left alone."""
    if is_repo(ckpt_dir):
        if ranks.local_rank == 0:
            fetch(ckpt_dir)
        barrier(ranks)


def check_chat_template(options: EngineOptions) -> None:
    """Refuses a way to encode dialogs that there is not, or that the folder has not."""
    if options.chat_template not in ("meta", "hf"):
        raise UserError(
            "chat_template is neither meta nor hf",
            f"found {options.chat_template!r}",
            "use one of them",
        )
    if options.chat_template == "hf":
        find_template(fetch(options.ckpt_dir, cached_only=True))


def same_everywhere(digest: bytes, ranks: Ranks) -> None:
    """Refuses ranks that see different checkpoints (another node's folder, a half-finished
    copy)."""
    mine = int.from_bytes(digest[:7], "big")
    all_of_them = gather_ints(mine, ranks)
    odd = [rank for rank, value in enumerate(all_of_them) if value != all_of_them[0]]
    if odd:
        raise UserError(
            "the ranks see different checkpoints",
            f"rank(s) {', '.join(map(str, odd))} differ from rank 0 in file "
            "names, sizes or headers",
            "copy the same folder to every node",
        )


def pick_dtype(wanted: str | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype asked for, else the stored one (fp16 becomes bf16 on CPU, which has no fast
    fp16)."""
    if wanted is None:
        return torch.bfloat16 if stored == torch.float16 and device.type == "cpu" else stored
    if wanted not in DTYPES:
        raise UserError(
            "--dtype is not one that llama_tp computes in",
            f"found {wanted!r}",
            f"use one of {', '.join(DTYPES)}",
        )
    return DTYPES[wanted]


def pick_mode(wanted: bool | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Deterministic or not, as asked for; unless asked, where it keeps its promise and costs
    little: on CPU with the C++ parts."""
    return fixes_rows(device, dtype) and library() is not None if wanted is None else wanted


def compiled(
    chosen: Backends, shard: Shard, ranks: Ranks, dtype: torch.dtype, deterministic: bool
) -> Backends:
    """`chosen` with what is worth compiling compiled; a rank that cannot says why."""
    out = compile_backends(chosen, shard, ranks, dtype, deterministic)
    for why in out.not_taken[len(chosen.not_taken) :]:
        warn(why, ranks)
    return out


def plan_cache(
    shard: Shard,
    ranks: Ranks,
    dtype: torch.dtype,
    max_seq_len: int,
    max_rows: int,
    step_tokens: int,
    block_size: int,
) -> int:
    """KV blocks on every rank: enough for a full batch of longest sequences, or as many as fit on
    the tightest rank. Raises UserError with the sum if not even one sequence fits."""
    budget = Budget(
        free=int(free_bytes(ranks) * MEMORY_SHARE),
        weights=weight_bytes(shard, dtype.itemsize),
        workspace=workspace_bytes(shard, step_tokens, max_rows, max_seq_len),
        kv_per_block=block_size * kv_bytes_per_token(shard, dtype.itemsize),
    )
    longest = -(-max_seq_len // block_size)
    return min(gather_ints(budget.n_blocks(longest * max_rows, longest, block_size), ranks))


def free_bytes(ranks: Ranks) -> int:
    """Memory this rank may take now: the GPU's free memory, or its share of the host's (cgroup
    limits included)."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":") for line in f)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        if os.path.exists(limit):
            with open(limit) as f, open(used) as g:
                most, now = f.read().strip(), int(g.read())
            if most.isdigit():
                free = min(free, int(most) - now)
    return free // ranks.local_size


def startup_warnings(
    options: EngineOptions,
    shard: Shard,
    ranks: Ranks,
    dtype: torch.dtype,
    max_seq_len: int,
    backends: Backends,
) -> list[str]:
    """What the user did not ask for, or may wrongly expect."""
    notes = list(backends.not_taken)
    if (
        ranks.device.type == "cpu"
        and library() is not None
        and ranks.tp > 1
        and ranks.n_nodes == 1
        and ranks.communicator is None
    ):
        notes.append(
            "the ranks have no shared memory (LLAMA_TP_SHARED=0, or no communicator in /dev/shm): "
            "sums go "
            "through gloo, slower"
        )
    elif (
        ranks.device.type == "cuda"
        and ranks.tp > 1
        and ranks.n_nodes == 1
        and ranks.communicator is None
    ):
        notes.append(
            "torch's symmetric memory is off, not to be had or not in agreement with NCCL: small "
            "sums go through NCCL"
        )
    if (options.max_seq_len or 0) > max_seq_len:
        notes.append(
            f"--max_seq_len {options.max_seq_len} cut to the {max_seq_len} positions that the "
            "model was trained for"
        )
    if options.deterministic and not shard.map.fixes_sums:
        notes.append(
            f"--deterministic at tp {ranks.tp}: the same bits in any batch, but not those of other "
            "tp"
        )
    if options.deterministic and ranks.device.type == "cpu" and not fixes_rows(ranks.device, dtype):
        notes.append(
            f"--deterministic in {str(dtype)[6:]}: bits that do not depend on the batch take the "
            "C++ products, or weights "
            "packed by oneDNN, and this machine has neither for this dtype"
        )
    if options.deterministic and ranks.device.type == "cuda":
        notes.append(
            "--deterministic on CUDA: sums over the ranks have a fixed order; cuBLAS may still "
            "choose other kernels for "
            "other batch sizes, so bits can depend on the batch"
        )
    return notes


def load_into(
    model: Transformer,
    source: Source,
    shard: Shard,
    ranks: Ranks,
    watch: Watch,
    quiet: bool,
    unless: Future[Tokenizer],
) -> None:
    """Reads this rank's bytes into the model; the driver shows how far all ranks are together.
    While one weight is read, a thread packs the one before. Ends at the next weight if `unless` has
    failed, raising its error."""
    total = sum(source.rank_bytes(each) for each in shard.map.shards())
    # A thread begins with OpenMP's own number of threads, not with the one that was set.
    packer = ThreadPoolExecutor(
        1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
    )
    with packer, Progress("loading", total, shown=ranks.is_driver and not quiet) as bar:

        def done(n: int) -> None:
            watch.add_done(n)
            bar.at(watch.all_done())

        packed: deque[Future[None]] = deque()
        destinations = Destinations(model)
        for weight in load(source, shard, destinations.view, done):
            if unless.done():
                unless.result()
            packed.append(packer.submit(destinations.mark_loaded, weight))
            if len(packed) > PACK_BEHIND:
                packed.popleft().result()
        for each in packed:
            each.result()
        barrier(ranks)
        bar.at(total)
