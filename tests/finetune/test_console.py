"""The command line itself: fast, and helpful."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import run_cli

from finetune import __version__
from finetune.commands import COMMANDS
from finetune.console import command_parser, json_output
from finetune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "datasets", "wandb"):
            raise AssertionError(name + " is imported")
sys.meta_path.insert(0, Refuse())
"""


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--cfg", "job"), ("--version",), ("--info", "config")]
)
def test_asking_about_the_program_imports_none_of_the_large_libraries(
    arguments: tuple[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    asked = run_cli(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))

    assert asked.returncode == 0, asked.stderr
    assert asked.stderr == ""


def test_help_gives_examples_and_the_choices(tmp_path: Path) -> None:
    text = run_cli("--help", cwd=tmp_path).stdout

    for part in (
        "python -m finetune dataset.path=",
        "llama2_7b",
        "lora/target: all_linear, attention, q_v",
        "resume=",
        *(f"python -m finetune.{command}" for command in COMMANDS),
        "python -m sweeps",
        "finetune -sc install=bash",
    ):
        assert part in text


@pytest.mark.parametrize(
    "module",
    ["finetune", "sweeps", *(f"finetune.{command}" for command in COMMANDS)],
)
def test_version_is_this_projects(module: str, tmp_path: Path) -> None:
    asked = run_cli("--version", cwd=tmp_path, module=module)

    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith(f"qlora-sweeps {__version__}")


def test_the_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    shown = run_cli("lora.r=0", cwd=tmp_path, HYDRA_FULL_ERROR="1")

    assert "Traceback" in shown.stderr
    assert shown.returncode == 1


SHOWS_BARS = """
from finetune.console import run_command
def command():
    from datasets import is_progress_bar_enabled
    from huggingface_hub.utils import are_progress_bars_disabled
    print(is_progress_bar_enabled(), not are_progress_bars_disabled())
run_command(command)
"""


@pytest.mark.parametrize("on_terminal", [True, False])
def test_download_bars_are_shown_on_a_terminal_only(on_terminal: bool) -> None:
    # A command that another test has run in this process has hidden them for its children.
    environment = {
        name: value for name, value in os.environ.items() if "PROGRESS_BAR" not in name
    }
    terminal, stderr = os.openpty() if on_terminal else os.pipe()
    shown = subprocess.run(
        [sys.executable, "-c", SHOWS_BARS],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
    )
    os.close(stderr)
    os.close(terminal)
    assert shown.stdout.decode() == f"{on_terminal} {on_terminal}\n"


@pytest.mark.parametrize(
    "module",
    [
        "finetune.generate",
        "finetune.evaluate",
        "finetune.export",
        "finetune.merge",
        "finetune.plan",
        "finetune.preview",
        "sweeps",
    ],
)
def test_a_commands_help_says_how_it_is_called(module: str, tmp_path: Path) -> None:
    text = run_cli("--help", cwd=tmp_path, module=module).stdout

    assert text.startswith(f"usage: python -m {module} ")
    assert "`" not in text
    examples = text.partition("examples:")[2].splitlines()[1:]
    assert examples
    assert all(line.startswith(f"  python -m {module} ") for line in examples)


def read_port(text: str) -> int:
    raise argparse.ArgumentTypeError(f"{text}: must be a port")


def read_numbers(*words: str) -> argparse.Namespace:
    parser = command_parser("finetune.some", "A command with numbers.")
    parser.add_argument("--gain", type=float)
    parser.add_argument("--count", type=int)
    parser.add_argument("--port", type=read_port)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "text", ["-1", "-0.5", "-.5", "-1e-3", "-2E+4", "-inf", "1e-3", "nan"]
)
def test_flags_take_all_numbers(text: str) -> None:
    assert repr(read_numbers("--gain", text).gain) == repr(float(text))


@pytest.mark.parametrize(
    ("flag", "text", "allowed"),
    [
        ("--gain", "1%", "must be a number"),
        ("--count", "1.5", "must be a whole number"),
        ("--port", "-1", "must be a port"),
    ],
)
def test_a_wrong_number_names_flag_value_and_what_is_allowed(
    flag: str, text: str, allowed: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag}={text}: {allowed}$"):
        read_numbers(flag, text)


def test_json_does_not_go_to_errors_where_stdout_is_closed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with json_output(True) as print_json:
        print_json({"loss": 1})
    assert capsys.readouterr().err == ""


def test_json_stands_alone_on_stdout_and_holds_no_nan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with json_output(True) as print_json:
        print("a library's remark")
        print_json({"loss": float("nan"), "perplexity": float("inf")})

    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"loss": None, "perplexity": None}
    assert "NaN" not in printed.out
    assert printed.err == "a library's remark\n"
