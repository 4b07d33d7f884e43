"""The house rules as a test: who may import whom, who must not see torch, what no module may
contain.

`faults` reads sources and needs nothing else, so the second half of this file can show it code that
breaks each rule.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llama_tp"
PAGE = PACKAGE / "README.md"

# The import table of the architecture page. A room is a folder; cli and every command (or api) is a
# module at the top.
MAY_IMPORT = {
    "arch": [],
    "text": ["arch"],
    "native": ["arch"],
    "parallel": ["arch", "native"],
    "checkpoint": ["arch"],
    "backends": ["arch", "native"],
    "model": ["arch", "native", "parallel", "backends"],
    "sampling": ["arch", "native", "parallel"],
    "engine": ["arch", "text", "native", "parallel", "checkpoint", "backends", "model", "sampling"],
    "protocol": ["arch", "text", "engine.request", "engine.delta"],
    "batch_job": ["arch", "text", "protocol", "engine.request", "engine.delta"],
    "server": [
        "arch",
        "text",
        "protocol",
        "engine.request",
        "engine.delta",
        "parallel.private_folder",
    ],
    "benchmarks": [
        "arch",
        "text",
        "native",
        "parallel",
        "checkpoint",
        "backends",
        "model",
        "sampling",
        "engine",
        "protocol",
    ],
    "cli": ["arch"],
}
ROOMS = [room for room in MAY_IMPORT if room != "cli"]
COMMANDS_MAY_IMPORT = ["cli", *ROOMS]  # never each other, nor api

# Packages of others that belong to one room: swapping one then touches one folder.
BELONGS_TO = {
    "fairscale": "parallel",
    "fire": "cli",
    "tiktoken": "text",
    "tokenizers": "text",
    "safetensors": "checkpoint",
    "huggingface_hub": "checkpoint",
    "fastapi": "server",
    "uvicorn": "server",
}
# These may be absent (extras), so the function that needs one may import it.
EXTRAS = {
    "tokenizers",
    "huggingface_hub",
    "matplotlib",
    "jinja2",
    "llguidance",
    "torchao",
    "prompt_toolkit",
    "triton",
}
LATE = {"torch.nn.attention.varlen"}  # imports torch's compiler, a second, and only CUDA needs it

NO_TORCH = re.compile(
    r"__(init|main)__|cli|chat|launch|plan|parallel\.(__init__|private_folder)|sampling\.__init__|native\.(?!calls\b)\w+|"
    r"(arch|text|protocol|batch_job|server)\.\w+|"
    r"engine\.(__init__|request|delta|blocks|scheduler|step|masks)|benchmarks\.(__init__|table|plot)"
)

FORBIDDEN_NAMES = {
    "broadcast_object_list",
    "scatter_object_list",
    "all_gather_object",
    "gather_object",
    "TYPE_CHECKING",
}
FORBIDDEN_MODULES = {"utils", "util", "common", "helpers", "misc"}
# Words the house does not use for its own names, and the word it uses.
WRONG_WORDS = [
    (r"num_\w+", "n_..."),
    (r"\w+_(seconds|secs|sec)", "..._s"),
    (r"\w+_(millis|msec)", "..._ms"),
    (r"hidden_(size|dim)|n_embd", "dim or ffn_dim"),
    (r"bsz|batch_sz", "B"),
    (r"seqlen", "T or n_tokens"),
]


def read_package() -> dict[str, str]:
    """Module name without the leading llama_tp -> source; a room's __init__ is "room.__init__"."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.AST, name: str, modules) -> list[tuple[ast.stmt, str]]:
    """(statement, dotted target) for each module that `name` imports anywhere; our own without the
    leading llama_tp."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    ["llama_tp", *name.split(".")[: -node.level], *filter(None, [node.module])]
                )
            # `from llama_tp.engine import step` imports the module engine.step; `... import Step`
            # does not
            subs = [
                f"{base}.{a.name}"
                for a in node.names
                if f"{base}.{a.name}".removeprefix("llama_tp.") in modules
            ]
            found += [(node, target) for target in subs or [base]]
    return found


def faults(sources: dict[str, str]) -> list[str]:
    """Each breach of a house rule as `module:line: what`."""
    found = []
    graph = {}
    for name, source in sources.items():
        tree = ast.parse(source, name)
        graph[name] = set()
        if ast.get_docstring(tree) is None:
            found.append(f"{name}:1: no docstring")
        if name.split(".")[-1] in FORBIDDEN_MODULES:
            found.append(f"{name}:1: a module must say what it is for")
        for node, target in imports(tree, name, sources):
            if target.split(".")[0] == "llama_tp":
                graph[name].add(target.removeprefix("llama_tp."))
            found += [f"{name}:{node.lineno}: {what}" for what in import_faults(name, target)]
        late = set()  # imports inside functions; a command's main is the one place for ours
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if not (is_command(name) and function.name == "main"):
                    late |= {
                        (node.lineno, target) for node, target in imports(function, name, sources)
                    }
        found += [
            f"{name}:{line}: import of {target} inside a function"
            for line, target in sorted(late)
            if target.split(".")[0] not in EXTRAS and target not in LATE
        ]
        for node in ast.walk(tree):
            found += [f"{name}:{node.lineno}: {what}" for what in node_faults(name, node)]
        found += [
            f"{name}:{i}: finish it or leave it out"
            for i, line in enumerate(source.splitlines(), 1)
            if re.search(r"\b(TODO|FIXME|XXX)\b", line)
        ]
    return found + circles(graph)


def is_command(name: str) -> bool:
    return "." not in name and name not in ("__init__", "cli", "api")


def import_faults(name: str, target: str):
    """What is wrong with module `name` importing `target`."""
    room, (top, *rest) = name.split(".")[0], target.split(".")
    if top in BELONGS_TO and room != BELONGS_TO[top]:
        yield f"{top} belongs to {BELONGS_TO[top]}"
    if top == "pickle":
        yield "pickle: what it reads can run code"
    if top == "llama_tp" and (not rest or rest[0] != room or room not in ROOMS):
        allowed = (
            COMMANDS_MAY_IMPORT if is_command(name) or name == "api" else MAY_IMPORT.get(room, [])
        )
        if ".".join(rest) not in allowed and not (rest and rest[0] in allowed):
            yield f"{room} must not import {target}"


def node_faults(name: str, node: ast.AST):
    """What is wrong with one node of module `name`."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        word = node.id if isinstance(node, ast.Name) else node.attr
        if word in FORBIDDEN_NAMES:
            yield f"{word} has no place here"
        if isinstance(node, ast.Attribute) and word == "argv" and name not in ("cli", "__main__"):
            yield "argv is read in cli alone, and where a command is found"
    if isinstance(node, ast.Call):
        keywords = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        function = ast.unparse(node.func)
        yield from (
            f"{key}=False" for key in ("weights_only", "strict") if keywords.get(key, True) is False
        )
        if function in ("eval", "exec"):
            yield f"{function} runs what it reads"
        if function == "torch.load" and keywords.get("weights_only") is not True:
            yield "torch.load without weights_only=True"
        if function == "print" and "file" not in keywords and "." in name:
            yield "stdout belongs to the commands"
    if isinstance(node, ast.ExceptHandler):
        kind = ast.unparse(node.type) if node.type else None
        if kind is None:
            yield "except without a type"
        elif kind in ("Exception", "BaseException") and [type(n) for n in node.body] == [ast.Pass]:
            yield f"except {kind}: pass"
    if isinstance(node, ast.Raise) and node.exc and "NotImplementedError" in ast.unparse(node.exc):
        yield "raises NotImplementedError: finish it or leave it out"
    if isinstance(node, ast.Global):
        yield "a global: pass it as an argument"
    own = ""  # the name that this node gives to something
    if isinstance(node, (ast.arg, ast.FunctionDef)):
        own = node.arg if isinstance(node, ast.arg) else node.name
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        own = node.id
    yield from (
        f"the name {own}: the house says {right}"
        for wrong, right in WRONG_WORDS
        if re.fullmatch(wrong, own)
    )


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, as one line a circle."""

    def reaches(start):
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {name: reaches(name) for name in graph}
    groups = {
        tuple(sorted(b for b in graph if b in reach[a] and a in reach[b]))
        for a in graph
        if a in reach[a]
    }
    return [f"{group[0]}:1: a circle of imports: {' '.join(group)}" for group in sorted(groups)]


def test_the_package_keeps_the_rules():
    assert faults(read_package()) == []


def test_nothing_unpickles():
    """The pickle of a .pth is read as data (checkpoint.state_dict); torch.load, restricted or not,
    stands nowhere."""
    assert [
        name
        for name, source in read_package().items()
        for node in ast.walk(ast.parse(source, name))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ] == []


def test_light_modules_leave_torch_out():
    light = [name for name in read_package() if NO_TORCH.fullmatch(name)]
    assert {"__init__", "cli", "arch.weights"} <= set(light)
    modules = [".".join(["llama_tp", *name.split(".")]).removesuffix(".__init__") for name in light]
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(name + ' imports torch')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not PAGE.exists(), reason="llama_tp/README.md is not written yet")
def test_the_architecture_page_is_true():
    page = PAGE.read_text()
    names = [name for name in read_package() if not name.endswith("__init__")]
    unnamed = [name for name in names if not re.search(rf"\b{name.split('.')[-1]}\b", page)]
    assert unnamed == [], "the page does not name these modules"
    absent = [
        path
        for path in re.findall(r"[\w/]+\.py\b", page)
        if not any((base / path).exists() for base in (ROOT, *PACKAGE.rglob("")))
    ]
    assert absent == [], "the page names files that are not there"
    for room in [r for r in ROOMS if (PACKAGE / r).exists() and r != "benchmarks"]:
        row = re.search(rf"^\| *{room} *\| *(.*?) *\|", page, re.MULTILINE)
        assert row and re.findall(r"[a-z._]+", row[1]) == MAY_IMPORT[room], (
            f"the page's table, row {room}"
        )


# The checker itself: code that breaks a rule, and the words of its fault.


@pytest.mark.parametrize(
    "name, code, fault",
    [
        ("arch.x", "import llama_tp.model.rope", "arch must not import llama_tp.model.rope"),
        ("arch.x", "from llama_tp import model", "arch must not import llama_tp"),
        ("arch.x", "from ..text import stream", "arch must not import llama_tp.text"),
        (
            "checkpoint.load",
            "from llama_tp.parallel.groups import Ranks",
            "checkpoint must not import",
        ),
        ("server.app", "from llama_tp.engine.scheduler import Scheduler", "server must not import"),
        ("server.app", "from llama_tp.engine import scheduler", "server must not import"),
        ("engine.x", "from llama_tp.cli import run", "engine must not import llama_tp.cli"),
        ("engine.x", "from llama_tp.generate import main", "engine must not import"),
        ("chat", "from llama_tp.generate import main", "chat must not import"),
        ("chat", "from llama_tp import Llama", "chat must not import"),
        ("cli", "import llama_tp.engine.engine", "cli must not import"),
        ("model.x", "import fairscale.nn.model_parallel", "fairscale belongs to parallel"),
        ("engine.x", "import pickle", "pickle"),
        ("engine.x", "def f():\n    from llama_tp.arch import errors", "inside a function"),
        (
            "engine.x",
            "class A:\n    def main(self):\n        import torch",
            "import of torch inside a function",
        ),
        ("generate", "def other():\n    import torch", "import of torch inside a function"),
        (
            "engine.x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
            "TYPE_CHECKING",
        ),
        ("engine.utils", "", "say what it is for"),
        (
            "parallel.x",
            "import torch.distributed as dist\ndist.broadcast_object_list([1])",
            "broadcast_object_list",
        ),
        ("checkpoint.x", "read('f', weights_only=False)", "weights_only=False"),
        ("checkpoint.x", "torch.load('f')", "without weights_only=True"),
        ("model.x", "m.load_state_dict(d, strict=False)", "strict=False"),
        ("model.x", "try:\n    a()\nexcept:\n    b()", "except without a type"),
        ("model.x", "try:\n    a()\nexcept Exception:\n    pass", "except Exception: pass"),
        ("model.x", "def f():\n    global g\n    g = 1", "a global"),
        ("model.x", "def f():\n    raise NotImplementedError", "NotImplementedError"),
        ("model.x", "a = 1  # TODO later", "finish it"),
        ("model.x", "print('x')", "stdout"),
        ("engine.x", "import sys\nsys.argv", "argv"),
        ("text.x", "eval('1')", "eval"),
        ("model.x", "def f(num_heads): ...", "the name num_heads: the house says n_..."),
        ("engine.x", "timeout_seconds = 3", "the house says ..._s"),
    ],
)
def test_a_breach_is_found(name, code, fault):
    found = faults(
        {name: f'"""Says what it does."""\n{code}\n', "engine.scheduler": '"""A module."""'}
    )
    assert len(found) == 1 and found[0].startswith(name) and fault in found[0], found


def test_a_missing_docstring_and_a_circle_are_found():
    assert faults({"model.x": "a = 1"}) == ["model.x:1: no docstring"]
    circle = {
        name: f'"""A module."""\nfrom llama_tp.model.{other} import f'
        for name, other in [("model.a", "b"), ("model.b", "c"), ("model.c", "a"), ("model.d", "a")]
    }
    assert faults(circle) == ["model.a:1: a circle of imports: model.a model.b model.c"]


@pytest.mark.parametrize(
    "name, code",
    [
        (
            "engine.engine",
            "import torch\nfrom llama_tp.model.rope import Rope\nfrom llama_tp.engine.step import "
            "Step",
        ),
        ("server.app", "from llama_tp.engine.request import Request\nimport fastapi"),
        (
            "generate",
            "from llama_tp.cli import run\ndef main():\n    from llama_tp.engine.engine import E\n "
            "   print(1)",
        ),
        ("text.tokenizer", "def f():\n    import tokenizers"),
        (
            "parallel.x",
            "import fairscale.nn.model_parallel as m\nimport sys\nprint('x', file=sys.stderr)\n"
            "try:\n    a()\nexcept OSError:\n    pass",
        ),
        (
            "checkpoint.x",
            "torch.load('f', weights_only=True, "
            "mmap=True)\nconfig['num_hidden_layers']\nf(num_threads=1)",
        ),
    ],
)
def test_good_code_is_left_in_peace(name, code):
    assert faults({name: f'"""Says what it does."""\n{code}\n'}) == []
