"""THE table of engine options: one field of `EngineOptions` is one option, with its type, default,
range and help.

Derived from it: the flags of generate, batch, serve and bench and their --help (cli.py), the flags
that the server gives its ranks, the parameters of `Llama.build`, and the page OPTIONS.md. To add an
option, add a field here, and read it where it matters (engine/build.py).
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

# Tokens of prompts in a step, by device: enough to reach the rate of its matrix products.
STEP_TOKENS = {"cpu": 512, "cuda": 8192}
# The longest sequence unless asked: few want the cache of all 131,072 tokens of a long context.
DEFAULT_SEQ_LEN = 8192


@dataclass(frozen=True)
class Help:
    """What --help says of a flag, and the title that it stands under."""

    title: str
    text: str


@dataclass(frozen=True)
class Range:
    """The least and the most that a flag's number may be."""

    least: float
    most: float


@dataclass(frozen=True)
class Without:
    """On a command's `options` parameter: the options that are no flags of this command."""

    names: tuple[str, ...]


PYTHON_ONLY = object()  # on an option: no command has it as a flag
TIMEOUT_S = Range(1, 10**6)


@dataclass(frozen=True)
class EngineOptions:
    """What a launch may choose. None means that the engine chooses. The first six are the
    parameters of Meta's `Llama.build`, in its order.

    A command whose default is another, or whose option another type, has a subclass.
    """

    ckpt_dir: Annotated[
        str,
        Help(
            "Model",
            "folder with Meta's params.json and consolidated.NN.pth, or HF's config.json and "
            "*.safetensors; or org/name on the Hugging Face hub",
        ),
    ]
    tokenizer_path: Annotated[
        str | None,
        Help("Model", "tokenizer.model or tokenizer.json, if it is not in ckpt_dir"),
    ] = None
    max_seq_len: Annotated[
        int | None,
        Help(
            "Resources",
            f"longest sequence, prompt and output; {DEFAULT_SEQ_LEN} or what the model was trained "
            "for, unless given",
        ),
        Range(1, 10**9),
    ] = None
    max_batch_size: Annotated[
        int, Help("Resources", "most sequences computed at once; more wait"), Range(1, 10**5)
    ] = 32
    model_parallel_size: Annotated[
        int | None, Help("Model", "must be the number of ranks, if given"), PYTHON_ONLY
    ] = None
    seed: Annotated[
        int, Help("Sampling", "decides the draws of requests that have no seed of their own")
    ] = 1
    dtype: Annotated[
        str | None, Help("Model", "bfloat16, float16 or float32; as stored unless given")
    ] = None
    device: Annotated[str | None, Help("Model", "cpu or cuda; what is there unless given")] = None
    deterministic: Annotated[
        bool | None,
        Help(
            "Model",
            "the same bits at tp 1, 2, 4 and 8 and in any batch; on by default on CPU, where it "
            "costs little",
        ),
    ] = None
    rope_factor: Annotated[
        float | None,
        Help("Model", "factor of Llama 3.1's RoPE scaling, where the checkpoint does not say it"),
    ] = None
    # Who encodes dialogs opens the template. The engine looks for it before it loads weights.
    chat_template: Annotated[
        Literal["meta", "hf"],
        Help(
            "Model",
            "meta for the Llama 3 chat format, hf for the template that the checkpoint's folder "
            "brings",
        ),
    ] = "meta"
    max_step_tokens: Annotated[
        int | None,
        Help(
            "Resources",
            f"most tokens of prompts in a step; {STEP_TOKENS['cpu']} on CPU, "
            f"{STEP_TOKENS['cuda']} on CUDA",
        ),
        Range(1, 10**9),
    ] = None
    prefix_cache: Annotated[
        bool, Help("Resources", "reuse the cache of prompts that begin alike")
    ] = True
    step_timeout: Annotated[
        float,
        Help(
            "Resources",
            "seconds after which a step counts as hung: the job ends, a server starts its ranks "
            "again",
        ),
        TIMEOUT_S,
    ] = 300.0
    load_timeout: Annotated[float, Help("Resources", "the same for loading"), TIMEOUT_S] = 3600.0
    quiet: Annotated[bool, Help("Resources", "print nothing but errors")] = False


def names() -> list[str]:
    """The options, in the table's order."""
    return [field.name for field in dataclasses.fields(EngineOptions)]


def args_doc() -> str:
    """The options as a docstring's `Args:`."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    lines = [
        f"    {name}: {mark.text}"
        for name in names()
        for mark in hints[name].__metadata__
        if isinstance(mark, Help)
    ]
    return "\n".join(["Args:", *lines])
