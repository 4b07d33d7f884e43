"""The commands as a person meets them: flags, help, exit codes. The last part holds for every
command there is."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_tp import cli
from llama_tp.arch.errors import UserError
from tests.ranks import torchrun

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(
    p.stem for p in (ROOT / "llama_tp").glob("*.py") if "\n    run(main)" in p.read_text()
)


def main(
    *,
    ckpt_dir: str,
    prompt: str = "",
    max_gen_len: int | None = None,
    temperature: float = 0.6,
    echo: bool = False,
    stream: bool = True,
    load: str | None = None,
    stop: tuple[str, ...] = (),
    device: Literal["cpu", "cuda"] = "cpu",
):
    """Writes text.

    Example:
        torchrun --nproc_per_node 8 -m thing --ckpt_dir D

    Checkpoint:
        ckpt_dir: the folder.

    Sampling:
        temperature: 0 is greedy;
            higher is more varied.
        max_gen_len: the most tokens.
    """


FLAGS = cli.flags_of(main)


def parse(*words, ckpt_dir="D"):
    """What the words mean, beside the one flag that is required."""
    values = cli.parse(FLAGS, ["--ckpt_dir", ckpt_dir, *words])
    assert values.pop("ckpt_dir") == ckpt_dir
    return values


def refusal(*words) -> str:
    with pytest.raises(UserError) as caught:
        cli.parse(FLAGS, list(words))
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["123", "true", "[1]", "None", "-", "-5", "-h", "a=b", "", " ", "a\nb", "'q'", "é"]
)
def test_text_stays_text(text):
    assert parse("--prompt", text) == {"prompt": text}
    assert parse(f"--prompt={text}") == {"prompt": text}


@given(st.text())
def test_any_text_survives_the_equals_form(text):
    assert parse(f"--prompt={text}") == {"prompt": text}


def test_values_get_the_annotated_type():
    assert parse("--temperature", "1") == {"temperature": 1.0}
    assert isinstance(parse("--temperature", "1")["temperature"], float)
    assert parse("--temperature", "-1.5e-3") == {"temperature": -1.5e-3}
    assert parse("--max-gen-len", "-7") == {"max_gen_len": -7}
    assert parse("--max_gen_len", "None") == {"max_gen_len": None}
    assert parse("--device=cuda") == {"device": "cuda"}


def test_switches():
    assert parse("--echo") == {"echo": True}
    assert parse("--echo", "--temperature", "1") == {"echo": True, "temperature": 1.0}
    assert parse("--echo", "False") == {"echo": False}
    assert parse("--echo=no") == {"echo": False}
    assert parse("--no_stream") == parse("--no-stream") == {"stream": False}


def test_repeated_flags_add_up():
    assert parse("--stop", "a", "--stop=1", "--stop", "[x,y]") == {"stop": ("a", "1", "[x,y]")}


@pytest.mark.parametrize(
    "words, parts",
    [
        (
            ["--ckpt_dir", "D", "--temperatur", "1"],
            ["unknown flag --temperatur", "did you mean --temperature?", "--help"],
        ),
        (["--ckpt_dir", "D", "--temperatur=1"], ["unknown flag --temperatur - ", "--temperature?"]),
        (["--ckpt_dir", "D", "-temperature", "1"], ["unknown flag -temperature", "--temperature?"]),
        (["--ckpt_dir", "D", "--zzz"], ["unknown flag --zzz - --help"]),
        (["--ckpt_dir", "D", "--no_temperature"], ["unknown flag --no_temperature"]),
        (["--prompt", "x"], ["missing --ckpt_dir"]),
        (["--ckpt_dir"], ["--ckpt_dir needs a value", "end of the line"]),
        (
            ["--ckpt_dir", "--prompt", "x"],
            ["--ckpt_dir needs a value", "--prompt next", "--ckpt_dir=VALUE"],
        ),
        (
            ["--ckpt_dir", "D", "--max_gen_len", "many"],
            ["--max_gen_len needs a whole number", "'many'"],
        ),
        (["--ckpt_dir", "D", "--max_gen_len", "1.5"], ["--max_gen_len needs a whole number"]),
        (["--ckpt_dir", "D", "--temperature", "hot"], ["--temperature needs a number", "'hot'"]),
        (["--ckpt_dir", "D", "--temperature", "nan"], ["--temperature needs a number"]),
        (["--ckpt_dir", "D", "--temperature", "none"], ["--temperature needs a number"]),
        (["--ckpt_dir", "D", "--echo", "perhaps"], ["--echo needs true or false", "'perhaps'"]),
        (["--ckpt_dir", "D", "--no_echo=1"], ["--no_echo takes no value"]),
        (["--ckpt_dir", "D", "--device", "tpu"], ["--device needs one of cpu, cuda", "'tpu'"]),
        (
            ["--ckpt_dir", "D", "--temperature", "1", "--temperature=2"],
            ["given twice", "1.0 and 2.0"],
        ),
        (["--ckpt_dir", "D", "--echo", "--no_echo"], ["--echo is given twice"]),
        (["Once"], ['did you mean --prompt "Once"?']),
        ([str(ROOT / "checkpoints/demo")], ["did you mean --ckpt_dir", "checkpoints/demo?"]),
        (["meta-llama/Llama-3.1-8B", "Once"], ["did you mean --ckpt_dir meta-llama/Llama-3.1-8B?"]),
        (["--ckpt_dir", "D", str(ROOT)], ["did you mean --prompt"]),
        (
            ["--ckpt_dir", "D", "--prompt", "x", __file__],
            ["did you mean --load ", "test_commands.py?"],
        ),
        (["--prompt", "Once", "upon", "a", "time"], ["'upon'", '--prompt "Once upon ..."']),
        (
            ["--ckpt_dir", "D", "--prompt", "x", "--echo", "true", "y"],
            ["a word without a flag", "'y'"],
        ),
        (["--ckpt_dir", "D", "--", "--trace"], ["a word without a flag", "'--'"]),
    ],
)
def test_refusals_name_flag_value_and_fix(words, parts):
    message = refusal(*words)
    for part in parts:
        assert part in message


def test_a_flag_with_several_values_takes_them_either_way():
    def command(*, names: tuple[str, ...] = (), sizes: list[int] = (), switch: bool = False): ...
    def with_word(what: str, *, names: tuple[str, ...] = ()): ...

    flags = cli.flags_of(command)
    for words in (
        ["--names", "a", "b", "--switch"],
        ["--names", "a", "--switch", "--names", "b"],
        ["--names=a", "--names", "b", "--switch"],
    ):
        assert cli.parse(flags, words) == {"names": ("a", "b"), "switch": True}
    assert cli.parse(flags, ["--sizes", "1", "2"]) == {"sizes": (1, 2)}
    with pytest.raises(UserError, match="a word without a flag"):
        cli.parse(flags, ["--names=a", "b"])
    assert cli.parse(cli.flags_of(with_word), ["--names", "a", "what"]) == {
        "names": ("a",),
        "what": "what",
    }


def test_a_number_of_any_length_is_read_or_refused():
    assert parse("--max_gen_len", "9" * 400)["max_gen_len"] == int("9" * 400)
    assert "needs a whole number" in refusal("--ckpt_dir", "D", "--max_gen_len", "9" * 5000)


def test_an_annotation_that_no_flag_can_have_is_our_bug():
    def odd(*, table: dict): ...

    with pytest.raises(TypeError, match="table"):
        cli.flags_of(odd)


def test_help_documents_every_flag_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = cli.help_text(main, FLAGS)
    assert "Writes text." in text and "torchrun --nproc_per_node 8" in text
    assert "--ckpt_dir TEXT" in text and "the folder. (required)" in text
    assert "0 is greedy; higher is more varied. (default 0.6)" in text
    assert "--device cpu|cuda" in text and "--no_stream" in text
    for name in FLAGS:
        assert sum(line.startswith(f"    --{name}") for line in text.splitlines()) == 1
    assert max(map(len, text.splitlines())) <= 100


COMMAND = '''
"""A command to test with."""
import os
from llama_tp.cli import run
from llama_tp.arch.errors import UserError

def main(*, how: str = "", times: int = 1):
    """Ends as it is told to.

    Flags:
        how: in what way.
        times: how often.
    """
    if how == "user":
        raise UserError("bad file", "found\\nnothing", "look again")
    if how == "bug":
        raise RuntimeError("ours")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "worker" and os.environ["RANK"] == "1":
        raise UserError("no GPU here")
    print(repr(how), times)
    return "never printed"

if __name__ == "__main__":
    run(main)
'''


@pytest.fixture
def command(tmp_path):
    """Runs the command above with words, and returns the finished process."""
    path = tmp_path / "thing.py"
    path.write_text(textwrap.dedent(COMMAND))

    def start(*words, rank=None):
        env = {**os.environ, "PYTHONPATH": str(ROOT)} | (
            {} if rank is None else {"RANK": str(rank)}
        )
        return subprocess.run(
            [sys.executable, str(path), *words], env=env, capture_output=True, text=True, timeout=60
        )

    return start


def test_main_gets_the_values_and_stdout_is_its_own(command):
    done = command("--how", "[1]", "--times", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "'[1]' 3\n", "")
    assert command("--how", "-").stdout == "'-' 1\n"
    assert command().stdout == "'' 1\n"


def test_a_user_error_is_one_line_and_code_1(command):
    done = command("--how", "user")
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "error: bad file - found nothing - look again\n",
    )


def test_a_bug_keeps_its_traceback(command):
    done = command("--how", "bug")
    assert (
        done.returncode == 1 and "Traceback" in done.stderr and "RuntimeError: ours" in done.stderr
    )


def test_ctrl_c_is_130_and_quiet(command):
    done = command("--how", "interrupt")
    assert (done.returncode, done.stderr) == (130, "")


def test_bad_flags_are_said_by_the_driver_alone_with_the_same_code_everywhere(command):
    driver, worker = command("--hwo", "x", rank=0), command("--hwo", "x", rank=1)
    assert driver.returncode == worker.returncode == 2
    assert driver.stderr == "error: unknown flag --hwo - did you mean --how? - --help lists them\n"
    assert worker.stderr == worker.stdout == ""


def test_help_is_printed_by_the_driver_alone(command):
    driver, worker = command("--help", rank=0), command("--help", rank=1)
    assert driver.returncode == worker.returncode == 0
    assert "--how TEXT" in driver.stdout and worker.stdout == ""


def test_a_worker_tells_what_happened_to_it_alone(command):
    done = command("--how", "worker", rank=1)
    assert (done.returncode, done.stderr) == (1, "[rank 1] error: no GPU here\n")


def test_torchrun_passes_one_clear_line_on(tmp_path):
    path = tmp_path / "thing.py"
    path.write_text(textwrap.dedent(COMMAND))
    for words, line in [
        ("--hwo x", "error: unknown flag --hwo - did you mean"),
        ("--how user", "error: bad file - "),
    ]:
        with torchrun(3, [str(path), *words.split()]) as job:
            assert job.wait() != 0
            said = [
                said for said in job.stderr.splitlines() if said.startswith(("error:", "[rank"))
            ]
        assert len(said) == 1 and said[0].startswith(line)


# Every command of the package.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_documents_every_flag(name):
    done = subprocess.run(
        [sys.executable, "-m", f"llama_tp.{name}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert f"python -m llama_tp.{name}" in done.stdout
    assert "Other flags:" not in done.stdout, "a flag is missing from main's docstring"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_flag_is_refused_before_torch_is_imported(name):
    # -X importtime lists every module that is imported, on stderr
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"llama_tp.{name}", "--temperaturr", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "error: unknown flag --temperaturr" in done.stderr
    imported = {
        line.rsplit("|", 1)[-1].strip()
        for line in done.stderr.splitlines()
        if "import time:" in line
    }
    assert "fire" in imported and "torch" not in imported


@pytest.mark.parametrize(
    "words",
    [
        "generate --prompt x",
        "batch --input README.md --output {}/out",
        "serve --port 0",
        "bench latency",
    ],
)
def test_a_config_that_cannot_be_read_is_refused_before_torch_is_imported(words, tmp_path):
    """A FIFO, which nobody may wait for; test_config has what else it may be."""
    os.mkfifo(tmp_path / "params.json")
    name, *words = words.format(tmp_path).split()
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            f"llama_tp.{name}",
            *words,
            "--ckpt_dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = [line for line in done.stderr.splitlines() if "import time:" not in line]
    assert (
        done.returncode == 1
        and len(said) == 1
        and said[0].startswith(f"error: {tmp_path}/params.json must be a regular file")
    )
    assert "torch" not in {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
