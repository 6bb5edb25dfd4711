"""Run whole commands on bad input, and check their error line and what they leave."""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from support.commands import Station
from support.matrix import fixed_part

OBSERVER = """
import atexit, os, sys
if os.environ.get("TEST_WITHOUT_BITSANDBYTES"):
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "bitsandbytes":
                raise ImportError("libcudart is broken")
    sys.meta_path.insert(0, Refuse())
atexit.register(lambda: open(os.environ["TEST_OBSERVED"], "w").write(str("torch" in sys.modules)))
"""
"""Run in the command's process: it writes at exit whether torch was imported."""


@dataclass(frozen=True)
class Outcome:
    """The exit code, output and duration of a command."""

    code: int
    stdout: str
    stderr: str
    torch_imported: bool
    seconds: float

    @property
    def error(self) -> str:
        """The text of the error line, which must be the only one and the last line of stderr."""
        lines = self.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.stderr
        assert lines[-1] == errors[0], self.stderr
        return errors[0].removeprefix("error: ")


@dataclass(frozen=True)
class Workplace:
    """An empty working directory, nothing cached, no package index, no GPU."""

    cwd: Path
    aside: Path
    station: Station

    def call(
        self, *arguments: str, module: str = "finetune", **environment: str
    ) -> Outcome:
        """Run a command that must be refused: exit code 1, no traceback, no line of Hydra's own.

        Args:
            arguments: The command line behind `python -m MODULE`.
            module: The module that is run.
            environment: Variables to set; they win over those of the workplace.
        """
        observed = self.aside / "observed"
        variables = {
            "TEST_OBSERVED": str(observed),
            "FINETUNE_CACHE": str(self.aside / "cache"),
            "HF_HOME": str(self.aside / "hub"),
            "PIP_NO_INDEX": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        start = time.monotonic()
        done = self.station.run(
            *arguments,
            cwd=self.cwd,
            module=module,
            before=OBSERVER,
            environment=variables,
        )
        seconds = time.monotonic() - start
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert "Error executing job" not in done.stderr
        return Outcome(
            done.returncode,
            done.stdout,
            done.stderr,
            observed.read_text() == "True",
            seconds,
        )

    def files(self) -> set[str]:
        """Return all paths in the working directory except the folder `outputs` itself."""
        return {str(path.relative_to(self.cwd)) for path in self.cwd.rglob("*")} - {
            "outputs"
        }

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Write files by name; a name that ends in / makes a folder."""
        for name, content in files.items():
            path = self.cwd / name
            if name.endswith("/"):
                path.mkdir(parents=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    content.encode() if isinstance(content, str) else content
                )


def matches(expected: str, line: str) -> bool:
    """Whether a line equals the expected one, in which … stands for any text."""
    return (
        re.fullmatch(".*".join(map(re.escape, expected.split("…"))), line) is not None
    )


@dataclass(frozen=True)
class Case:
    """A command line that must be refused, and the line that says why."""

    id: str
    arguments: str
    says: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, ...]:
        """What the case has in common with others: section, message, and the form of what is
        refused."""
        section = self.says.partition(".")[0]
        message = re.split(r"[…;?]", self.says.partition(": ")[2])[0] or self.id
        sign = re.match(r"[-+~]*", self.arguments)
        return (
            section,
            message,
            sign[0] if sign else "",
            _form(self.arguments.rpartition("=")[2]),
        )


def _form(value: str) -> str:
    """The type of a value on the command line; infinity and not-a-number are types of their own."""
    if value in ("nan", "inf"):
        return value
    return type(yaml.safe_load(value)).__name__


def each(
    cases: list[Case], kind: Callable[[Case], object] = lambda case: case.kind
) -> pytest.MarkDecorator:
    """Parametrize a test by the cases of a table, of which a fixed part runs by default."""
    return pytest.mark.parametrize(
        "case", fixed_part(cases, kind), ids=[case.id for case in cases]
    )


def lines(*rows: object) -> str:
    """Return rows as the text of a JSON lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = lines(*({"text": f"Row {number} says something."} for number in range(20)))
FILE_TYPES = ".jsonl .json .csv .tsv .txt (also .gz .zst) .parquet .arrow .feather file"
ANY_FILE = f"allowed: python_docs, a hub id (owner/name), a {FILE_TYPES}, a folder"


def assert_the_result_says(workplace: Workplace, error: str) -> None:
    """Check that `result.json` of the only run folder has the error."""
    (result,) = workplace.cwd.glob("outputs/runs/default/*/result.json")
    content = json.loads(result.read_text())
    assert (content["status"], content["error"]) == ("failed", error)
