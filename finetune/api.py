"""Runs from Python: `finetune.train` and `finetune.load` return a `Run`.

Each call does what the command of its name does, with the same checks, log lines and folders, and
leaves the process as it was: see `finetune.in_process`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.app import require_overrides, run_overrides, run_to_resume
from finetune.config.schema import RunConfig
from finetune.console import log_to_stderr
from finetune.data.types import Prompt
from finetune.errors import did_you_mean, refusal
from finetune.evaluate import LOGGERS as EVALUATE_LOGGERS
from finetune.evaluate import EvaluationResult, compare
from finetune.files.atomic import read_json
from finetune.files.find_run import LATEST, find_run
from finetune.files.output_paths import new_folder
from finetune.files.run_folder import Metrics, RunFolder
from finetune.generate import LOGGERS as GENERATE_LOGGERS
from finetune.generate import answer_prompts
from finetune.generation_arguments import (
    check_sampling,
    require_positive,
    require_text,
)
from finetune.in_process import in_process
from finetune.run.job import run_job
from finetune.run.load import read_run_config
from finetune.run.merging import LOGGERS as MERGE_LOGGERS
from finetune.run.merging import MergedModel, merge_run
from finetune.run.result import Objective
from finetune.run.run import resume
from finetune.run_arguments import DTYPES

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EvaluationResult", "MergedModel", "Run", "load", "train"]


def train(*overrides: str) -> "Run":
    """Train a run, as `python -m finetune OVERRIDES` does.

    Args:
        overrides: overrides of the config, as `"lora.r=8"`; `"resume=RUN"` resumes a run, with no
            other override than `mirror`.

    Returns:
        The completed run.

    Raises:
        ConfigError: a value is not allowed; the message is the command's line.
        KeyboardInterrupt: Ctrl-C; in training after the present step, and the message says how
            the run is resumed.
    """
    require_overrides(overrides)
    with in_process():
        resumed = run_to_resume(overrides)
        if resumed is None:
            job = run_overrides(overrides, run_job)
            folder = Path(job.hydra_cfg.hydra.runtime.output_dir)
        else:
            resume(*resumed)
            folder = resumed[0]
    return Run(folder.absolute())


def load(run: str | Path = LATEST) -> "Run":
    """Return a run that has begun.

    Args:
        run: its folder, its name under `outputs/runs` (NAME: its newest, NAME/TIME), or `latest`.

    Raises:
        ConfigError: there is no such run.
    """
    return Run(find_run("RUN", str(run)).absolute())


@dataclass(frozen=True)
class Run:
    """A run that has begun, by its folder. All properties are read from its files."""

    path: Path
    """The run folder."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {os.path.relpath(self.path)}: {self.status}>"

    @property
    def result(self) -> dict[str, Any]:
        """The content of `result.json`; empty while the run trains, and after a kill."""
        result: dict[str, Any] = read_json(self._folder.result) or {}
        return result

    @property
    def status(self) -> str:
        """completed, pruned, interrupted or failed; running where there is no result yet."""
        return str(self.result.get("status", "running"))

    @property
    def config(self) -> RunConfig:
        """The checked config that the run was trained with."""
        return read_run_config(self.path)

    @property
    def metrics(self) -> Metrics:
        """The final metrics by name, as `eval/loss` in nats per token; empty without a result."""
        recorded = self.result.get("metrics", {})
        # JSON has no NaN and no infinity: `null` stands there.
        return {name: _number(value) for name, value in recorded.items()}

    @property
    def objective(self) -> Objective:
        """The objective; one value for each of several objectives; None where there is none."""
        recorded = self.result.get("objective")
        if isinstance(recorded, list):
            return tuple(_number(entry["value"]) for entry in recorded)
        return None if recorded is None else _number(recorded["value"])

    def history(self) -> "pd.DataFrame":
        """Return the logged metrics: a row for each logged optimizer step, a column for each name.

        The column `step` is the optimizer step. A metric that was not logged at a step is NaN.
        """
        import pandas as pd

        rows: dict[int, dict[str, Any]] = {}
        for line in self._folder.metrics():
            # Training and evaluation log their metrics of a step apart.
            rows.setdefault(line["step"], {}).update(line)
        return pd.DataFrame([rows[step] for step in sorted(rows)])

    def generate(
        self,
        prompts: Sequence[str],
        *,
        system: str | None = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | None = None,
        base: bool = False,
    ) -> list[str]:
        """Answer prompts with the run's adapter, as `python -m finetune.generate` does.

        The base is loaded for each call, so give all prompts at once.

        Args:
            prompts: the prompts.
            system: the system turn before each prompt; None: none.
            max_new_tokens: limit of each answer, in tokens.
            max_length: limit of a prompt and its answer together, in tokens. Without either limit,
                those of the run's samples hold.
            temperature: tokens are drawn, with logits divided by it; 0: each is the likeliest.
            top_p: tokens are drawn from the likeliest that have this share together; None: all.
            seed: seed of drawn tokens; None: the run's.
            base: whether the base answers, without the adapter.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            ConfigError: a value is not allowed, or the run has no adapter.
        """
        if not isinstance(prompts, Sequence) or isinstance(prompts, str):
            raise refusal("prompts", prompts, "must be a list of texts")
        for index, prompt in enumerate(prompts):
            require_text(f"prompts[{index}]", prompt)
        if system is not None:
            require_text("system", system)
        check_sampling(temperature, top_p, seed)
        require_positive("max_new_tokens", max_new_tokens)
        require_positive("max_length", max_length)
        with in_process():
            log_to_stderr(*GENERATE_LOGGERS)
            return answer_prompts(
                self.path,
                [Prompt(text, system) for text in prompts],
                base=base,
                max_new_tokens=max_new_tokens,
                max_length=max_length,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )

    def evaluate(
        self, data: str | Path, *, answers: str | Path | None = None
    ) -> EvaluationResult:
        """Evaluate the adapter and its base on other rows, as `python -m finetune.evaluate` does.

        Args:
            data: a file or folder of rows, or a hub id.
            answers: a file for each row's prediction, reference and scores as JSON lines, of a run
                with `evaluation.metrics`; None: none.

        Returns:
            The metrics of base and adapter.

        Raises:
            ConfigError: the rows can't be read, or the run has no adapter.
        """
        with in_process():
            log_to_stderr(*EVALUATE_LOGGERS)
            answers_file = None if answers is None else str(answers)
            return compare(self.path, str(data), answers_file).to_dict()

    def merge(self, path: str | Path, *, dtype: str = "bfloat16") -> MergedModel:
        """Merge the adapter into its base, as `python -m finetune.merge` does.

        Args:
            path: a new folder for the merged model.
            dtype: of the merged weights: bfloat16, float16 or float32.

        Returns:
            The folder, and what merging and rounding have changed.

        Raises:
            ConfigError: the folder holds something, or the run can't be merged.
        """
        folder = new_folder("path", path)
        if dtype not in DTYPES:
            raise refusal("dtype", dtype, did_you_mean(dtype, DTYPES))
        with in_process():
            log_to_stderr(*MERGE_LOGGERS)
            return merge_run(self.path, folder, dtype)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
