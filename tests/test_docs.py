"""Every command in README.md, docs/ and the help text can be pasted into bash, and the program
takes it."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf, open_dict

from finetune.app import check_override, parse_hydra_arguments
from finetune.config.paths import CONF
from finetune.config.schema import RunConfig
from sweeps.space.parameters import VARIANTS
from sweeps.space.points import extreme_points
from sweeps.space.space import Space

ROOT = Path(__file__).resolve().parent.parent
DOCS = [
    ROOT / "README.md",
    ROOT / "AGENTS.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMAND = re.compile(r"python -m (?:finetune|sweeps)\b.*")
ARGUMENT = re.compile(
    r"['\"]?([~+]*[a-z][a-z_0-9]*([./][a-z_0-9]+)*=|~[a-z]|--config-dir )"
)
"""How a code span of arguments alone begins: `key=value`, `~key`, `--config-dir`; capitals: the
environment."""
STAND_INS = {"model": "name_or_path: smollm2_135m\n", "dataset": "path: python_docs\n"}
"""Choices of a reader's own folder, by group: where a choice must give a value."""


def written_commands(text: str) -> Iterator[str]:
    """The commands of a Markdown text: lines of code, and code spans; arguments alone are those of
    a study."""
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield from COMMAND.findall(line)
        else:
            for span in re.findall(r"`([^`]+)`", line):
                if COMMAND.match(span):
                    yield span
                elif ARGUMENT.match(span):
                    yield f"python -m finetune -m hydra/sweeper=optuna {span}"


def bash_words(line: str) -> list[str]:
    """The words of a command line. Raises ValueError for what bash would read as more than plain
    words."""
    unquoted = re.sub(r"'[^']*'|\"[^\"$`]*\"", "quoted", line)
    command, *_ = re.split(r"\s#", unquoted, maxsplit=1)
    special = re.search(r"[][(){}<>|&;*?!$`\"'…\\]", command)
    if special:
        raise ValueError(f"{special[0]} without quotes: {line}")
    return shlex.split(line, comments=True)


class Parsed(BaseException):
    """Ends a command once its arguments are read."""


def require_taken(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise what the program raises for a command, up to the point where it would begin its
    work."""
    module, arguments = words[2], words[3:]
    if module == "finetune":
        parsed = parse_hydra_arguments(arguments)
        if not parsed.help:
            require_composed(
                parsed.overrides, parsed.multirun, folder if parsed.config_dir else None
            )
    elif module in ("finetune.fetch", "finetune.plan", "finetune.preview"):
        monkeypatch.setattr("sys.argv", [module, *arguments])
        parsed = importlib.import_module(module)._parse_arguments()
        multirun = getattr(parsed, "multirun", False)
        require_composed(parsed.overrides, multirun, None)
    elif arguments != ["--help"]:
        parse_args = argparse.ArgumentParser.parse_args

        def parse(parser: argparse.ArgumentParser, *given: Any) -> None:
            parse_args(parser, *given)
            raise Parsed

        monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
        monkeypatch.setattr("sys.argv", [module, *arguments])
        main = importlib.import_module(
            f"{module}.__main__" if module == "sweeps" else module
        ).main
        with pytest.raises(Parsed):
            main()


def require_composed(
    overrides: list[str], multirun: bool, further: Path | None
) -> None:
    """Compose and check a run's config; of a sweep the run with the first values. `further` stands
    for --config-dir."""
    for_study = [
        text
        for text in overrides
        if text.startswith(("hydra/sweeper", "hydra.sweeper", "search"))
    ]
    assert multirun or not for_study, f"{for_study} has no effect without -m"
    parsed = OverridesParser.create().parse_overrides(
        [check_override(text) for text in overrides]
    )
    texts: list[str] = []
    for override in parsed:
        texts += first_values(override) if multirun else [str(override.input_line)]
    if further is not None:
        for override in parsed:
            choice = further / override.key_or_group / f"{override.value()}.yaml"
            if (CONF / override.key_or_group).is_dir() and not (
                CONF / choice.relative_to(further)
            ).exists():
                choice.parent.mkdir(parents=True, exist_ok=True)
                choice.write_text(
                    STAND_INS.get(override.key_or_group, "# @package _global_\n")
                )
        texts.append(f"hydra.searchpath=[file://{further}]")
    with initialize_config_dir(str(CONF)):
        composed = compose("config", texts, return_hydra_config=True)
    with open_dict(composed):
        del composed["hydra"]
    RunConfig.from_hydra(composed)


def first_values(override: Override) -> list[str]:
    """Overrides with one value, the first of a sweep; those of the first variant."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    sweep = override.value()
    if VARIANTS in sweep.tags:
        space = Space.parse({}, [str(override.input_line)])
        return space.overrides(extreme_points(space)[0])
    value = (
        sweep.start
        if isinstance(sweep, IntervalSweep)
        else next(override.sweep_string_iterator())
    )
    return [f"{override.get_key_element()}={value}"]


def help_commands() -> list[str]:
    """The commands of `python -m finetune --help`, whose meaning stands two spaces behind them."""
    text = OmegaConf.load(CONF / "config.yaml").hydra.help.template
    return [re.split(r"\s{2,}", command)[0] for command in COMMAND.findall(text)]


ALL = [
    *(
        (path.relative_to(ROOT).as_posix(), command)
        for path in DOCS
        for command in written_commands(path.read_text())
    ),
    *(("help", command) for command in help_commands()),
]


def test_there_are_commands_to_test() -> None:
    assert {"README.md", "docs/reports.md", "docs/search-space.md", "help"} <= {
        source for source, _ in ALL
    }


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in ALL))
def test_a_written_command_can_be_pasted_and_is_taken(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.endswith("="):  # its choices follow
        assert (CONF / command.rstrip("=").split()[-1]).is_dir()
        return
    require_taken(bash_words(command), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python -m finetune lora.q=8",
        "python -m finetune lora=r9",
        "python -m finetune lora.r=0",
        "python -m finetune --no-such-flag",
        "python -m finetune lora=r8,r16",
        "python -m finetune hydra/sweeper=optuna",
        "python -m finetune dataset.path=./mine.jsonl      your rows",
        "python -m finetune dataset.path=./mine.jsonl      your rows; any",
        "python -m finetune -m hydra/sweeper=optuna lora.r=choice(8,16)",
        "python -m finetune -m hydra/sweeper=optuna '+x=range(1,9)'",
        "python -m finetune -m hydra/sweeper=optuna hydra.sweeper.trials=3",
        'python -m finetune -m hydra/sweeper=optuna "hydra.sweeper.storage=${oc.env:STUDY_DATABASE}"',
        "python -m finetune resume=<run>",
        "python -m finetune resume=…",
        "python -m finetune.plan lora.q=8",
        "python -m finetune.generate RUN",
        "python -m sweeps show",
        "python -m sweeps show S   its trials",
        "python -m sweeps confirm S --tops 3",
        "python -m sweeps list | show S",
    ],
)
def test_a_command_that_would_fail_fails_the_test(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((Exception, SystemExit)):
        require_taken(bash_words(command), tmp_path, monkeypatch)


def test_arguments_in_a_text_are_commands_too() -> None:
    text = (
        "Run `+x=range(1,9)` or `python -m sweeps list`, with `HYDRA_FULL_ERROR=1`.\n\n"
        "    python -m finetune seed=1  # x\n"
    )
    study = "python -m finetune -m hydra/sweeper=optuna"
    assert list(written_commands(text)) == [
        f"{study} +x=range(1,9)",
        "python -m sweeps list",
        "python -m finetune seed=1  # x",
    ]
