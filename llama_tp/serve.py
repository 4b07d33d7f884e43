"""Command: a server for OpenAI's clients.

This one module is two programs. Started by a person it is the HTTP server, without torch, which
starts torchrun on this very module; started by torchrun (RANK is set) it is one rank, which serves
what comes over the link.
"""

import os
import re
import shlex
import sys
from typing import Annotated, Literal

from llama_tp.arch.config import check_launch
from llama_tp.arch.errors import UserError
from llama_tp.arch.options import EngineOptions, Range
from llama_tp.cli import run
from llama_tp.protocol.defaults import SamplingDefaults, generation_config_of, sampling_flags

# a key on the command line can be read by every user of the machine
KEY_VARIABLE = "LLAMA_TP_API_KEY"


def main(
    *,
    options: EngineOptions,
    nproc_per_node: Annotated[int, Range(1, 4096)] = 1,
    host: str = "127.0.0.1",
    port: Annotated[int, Range(0, 65535)] = 8000,
    served_model_name: tuple[str, ...] = (),
    strict_model_name: bool = False,
    api_key: tuple[str, ...] = (),
    allow_origins: tuple[str, ...] = (),
    page: bool = True,
    metrics_prefix: Literal["llama_tp", "vllm"] = "llama_tp",
    max_queue: Annotated[int, Range(0, 10**6)] = 1024,
    max_queue_logprobs: Annotated[int, Range(0, 10**9)] = 16777216,
    max_connections: Annotated[int | None, Range(1, 10**6)] = None,
    keep_alive_timeout: Annotated[float, Range(0, 10**6)] = 5.0,
    max_body_bytes: Annotated[int, Range(1, 1 << 27)] = 8388608,
    max_n: Annotated[int, Range(1, 128)] = 128,
    max_prompts: Annotated[int, Range(1, 10**5)] = 1024,
    max_stop: Annotated[int, Range(0, 1000)] = 16,
    drain_timeout: Annotated[float, Range(0, 10**6)] = 20.0,
    max_restarts: Annotated[int, Range(0, 1000)] = 5,
    nnodes: Annotated[int, Range(1, 4096)] = 1,
    master_addr: str | None = None,
    master_port: int = 29500,
    generation_config: str = "auto",
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    max_gen_len: int | None = None,
) -> None:
    """Serve a Llama 3 checkpoint to OpenAI's clients, and to a browser at /.

    It starts torchrun itself, and starts it again when a rank dies: requests then go on where they
    stopped.

    Examples:
        python -m llama_tp.serve --ckpt_dir checkpoints/demo --nproc_per_node 2
        python -m llama_tp.serve --ckpt_dir Meta-Llama-3-70B-Instruct/original \\
            --nproc_per_node 8 --host 0.0.0.0 --api_key KEY

    Server:
        host: address to listen at; 0.0.0.0 lets other machines in
        port: to listen at; 0 takes a free one and says which
        served_model_name: what replies call the model, and further names to list it under; the
            folder's name unless given
        strict_model_name: refuse requests for any other name; without it every name is answered, as
            there is one model
        api_key: clients must send this key (or another, if given several times); LLAMA_TP_API_KEY
            does the same
        page: a page for browsers at /
        allow_origins: web pages of these origins (https://app.example, or * for any) may ask, as
            browsers let them only then
        metrics_prefix: vllm names the metrics as vLLM does, for its dashboards
        drain_timeout: seconds that requests have to finish after SIGTERM or Ctrl-C

    Limits:
        max_queue: most samples that wait for a place in the batch; more get 429
        max_queue_logprobs: most logprobs (samples x tokens x alternatives) that all requests
            together may ask for; more get 429
        max_connections: most clients connected at once; 4096, or what the limit of open files
            allows, unless given
        keep_alive_timeout: seconds that a connection may wait for its next request; more than a
            proxy in front keeps its own
        max_body_bytes: longest request
        max_n: most samples of a prompt
        max_prompts: most prompts in a request
        max_stop: most stop strings of a request

    Ranks:
        nproc_per_node: ranks on each node
        nnodes: nodes; the others run the line that is printed
        master_addr: this node's address, for the others
        master_port: a free port at that address; the one after it must be free too
        max_restarts: how often, in ten minutes, the ranks are started again

    Model:

    Sampling, for requests that do not say it themselves:
        generation_config: auto for the generation_config.json of ckpt_dir, if there is one (its
            temperature, top_p, top_k, min_p, repetition_penalty and max_new_tokens count, as in
            vLLM); a path for another; none for OpenAI's defaults
        temperature: 0 is greedy; what generation_config says, else 1, unless given; likewise:
        top_p: only the likeliest tokens that together are this probable; else 1
        top_k: only this many of the likeliest tokens; else 0, which is off
        min_p: only tokens at least this fraction as likely as the likeliest; else 0
        repetition_penalty: above 1 makes what was said already less likely; else 1
        max_gen_len: most tokens of an answer; else as many as fit, and 16 for /v1/completions,
            which is OpenAI's
        seed: with a request's number since the start, decides its draws

    Resources:
        quiet: print no progress of loading
    """
    if "RANK" in os.environ:
        from llama_tp.engine.build import build
        from llama_tp.engine.service import serve
        from llama_tp.parallel.hard_exit import leave
        from llama_tp.server.link import RankEnd

        loaded: list[bool] = []

        def server_has_gone() -> None:
            # while we load, it is not waited for; later the loop sees it, and ends in good order
            if not loaded:
                leave(1, "the HTTP server has gone")

        link = RankEnd(link_path(), server_has_gone) if os.environ["RANK"] == "0" else None
        engine = build(options)
        loaded.append(True)
        if link is not None:  # the driver
            serve(engine, link)
            engine.dismiss()
        else:
            engine.follow()
        engine.close()
        return
    keys = (*api_key, *filter(None, [os.environ.pop(KEY_VARIABLE, "")]))
    if not all(key and key.isascii() and key.isprintable() for key in keys):
        raise UserError(
            "an API key must be made of ASCII characters, at least one",
            "found one that is not",
            "correct it (an empty one would let everybody in)",
        )
    given = sampling_flags(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_gen_len,
    )
    check_origins(allow_origins)
    check_names(served_model_name)
    check_launch(options.ckpt_dir, nnodes * nproc_per_node)

    from llama_tp.checkpoint.hub import fetch
    from llama_tp.protocol.order import Limits
    from llama_tp.server import api_server, supervisor
    from llama_tp.server.connections import ConnectionLimits
    from llama_tp.text.template import open_template
    from llama_tp.text.tokenizer import open_tokenizer

    folder = fetch(options.ckpt_dir)
    if not os.path.isdir(folder):
        raise UserError(
            f"--ckpt_dir {folder} is no folder",
            "it is a file" if os.path.exists(folder) else "there is none",
            "point it at the checkpoint's folder, or write org/name of a model on the hub",
        )
    tokenizer = open_tokenizer(options.tokenizer_path, folder)
    chat = open_template(folder, tokenizer) if options.chat_template == "hf" else None
    defaults = SamplingDefaults(generation_config_of(folder, generation_config), given)
    launch = launch_flags(nproc_per_node, nnodes, master_addr, master_port)
    ranks = ["-m", "llama_tp.serve", *words_of(options)]
    for node in range(1, nnodes):
        line = shlex.join(
            ["python", "-m", "llama_tp.launch", *launch, "--node_rank", str(node), *ranks]
        )
        print(f"server: on node {node} run, again whenever it ends: {line}", file=sys.stderr)
    api_server.run(
        api_server.ServerOptions(
            command=[sys.executable, "-m", "llama_tp.launch", *launch, *ranks],
            name=served_model_name[0] if served_model_name else name_of(options.ckpt_dir),
            aliases=served_model_name[1:],
            strict_name=strict_model_name,
            tokenizer=tokenizer,
            chat=chat,
            defaults=defaults,
            host=host,
            port=port,
            keys=keys,
            max_queue=max_queue,
            max_queue_logprobs=max_queue_logprobs,
            max_body_bytes=max_body_bytes,
            allow_origins=allow_origins,
            metrics_prefix=metrics_prefix,
            connections=ConnectionLimits(max_connections, keep_alive_s=keep_alive_timeout),
            limits=Limits(max_n, max_prompts, max(2048, max_n), max_stop),
            drain_s=drain_timeout,
            seed=options.seed,
            with_page=page,
            policy=supervisor.Policy(
                max_restarts,
                silence_s=options.step_timeout + 30,
                load_s=options.load_timeout + 30,
            ),
        )
    )


def link_path() -> str:
    """Where the HTTP server listens for rank 0. Raises UserError if it has not started us."""
    if "LLAMA_TP_LINK" not in os.environ:
        raise UserError(
            "serve starts its ranks itself",
            "RANK is set: torchrun or the like has started it",
            "run python -m llama_tp.serve without a launcher",
        )
    return os.environ["LLAMA_TP_LINK"]


def check_names(names: tuple[str, ...]) -> None:
    """Raises UserError for names that no client could ask for, and for one that is there twice."""
    for i, name in enumerate(names):
        if not name.strip() or not name.isprintable() or len(name) > 1000 or name in names[:i]:
            raise UserError(
                "--served_model_name needs names of 1 to 1000 printable characters, each once",
                f"found {name[:80]!r}",
                "correct it",
            )


def check_origins(origins: tuple[str, ...]) -> None:
    """Raises UserError for what no browser would ever send as its origin."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s,*]+", origin):
            raise UserError(
                "--allow_origins needs origins as browsers send them",
                f"found {origin[:80]!r}",
                "write scheme://host[:port] without a slash at the end, or *",
            )


def launch_flags(
    nproc_per_node: int, nnodes: int, master_addr: str | None, master_port: int
) -> list[str]:
    """The launcher's own flags, for every node."""
    if nnodes == 1:
        return ["--nproc_per_node", str(nproc_per_node)]
    if master_addr is None:
        raise UserError(
            "several nodes need an address to meet at",
            "--master_addr is not given",
            "give --master_addr this node's name or address, as the others see it",
        )
    return [
        "--nnodes",
        str(nnodes),
        "--nproc_per_node",
        str(nproc_per_node),
        "--master_addr",
        master_addr,
        "--master_port",
        str(master_port),
    ]


def words_of(options: EngineOptions) -> list[str]:
    """The options as the ranks are given them. None is left to its default, and the chat template
    to the server, which encodes dialogs itself."""
    return [
        f"--{name}={value}"
        for name, value in vars(options).items()
        if value is not None and name != "chat_template"
    ]


def name_of(ckpt_dir: str) -> str:
    """What the model is called: its hub name, or its folder's, but for Meta's folders inside
    HF's."""
    parts = [
        part
        for part in os.path.normpath(ckpt_dir).split(os.sep)
        if part not in ("original", "mp8", "mp16", ".", "..", "")
    ]
    return ckpt_dir if not os.path.isdir(ckpt_dir) else parts[-1] if parts else "model"


if __name__ == "__main__":
    run(main)
