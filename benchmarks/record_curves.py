"""Records learning curves of unpruned runs, for `replay_pruners.py`.

    python benchmarks/record_curves.py CURVES.csv [--rows python_docs] [--configs 200]
        [--repeated 20] [--seeds 3] [--steps 54] [OVERRIDE ...]

Random points of the default space are trained to their end, with a held-out evaluation at each
27th of the steps; some of them with further seeds. Two sets of rows need no download: the default
ones (`python_docs`: questions on the standard library), and `functions`, the docstrings and sources
of the standard library's functions. A GPU trains the runs in slots.

The CSV has a line for each evaluation: trial, seed, step, value (`eval/loss`), and the point's
parameters.
"""

import argparse
import ast
import csv
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune.files.run_folder import RunFolder
from sweeps.study.study import Study

EVALUATIONS = 27


def main() -> None:
    """Train one study for each seed, and write the curves of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("curves", type=Path)
    parser.add_argument(
        "--rows", choices=["python_docs", "functions"], default="python_docs"
    )
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--repeated", type=int, default=20, help="with every seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2 * EVALUATIONS, help="of a run")
    parser.add_argument("overrides", nargs="*", help="of the runs")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = [
            *rows_overrides(arguments.rows, folder),
            f"trainer.max_steps={arguments.steps}",
            f"trainer.eval_steps={arguments.steps // EVALUATIONS}",
            *arguments.overrides,
        ]
        with arguments.curves.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            names: list[str] = []
            for seed in range(arguments.seeds):
                trials = arguments.configs if seed == 0 else arguments.repeated
                study = run_study(folder / str(seed), seed, trials, overrides)
                for trial in study.trials():
                    if not names:
                        names = list(trial.params)
                        writer.writerow(["trial", "seed", "step", "value", *names])
                    point = [trial.params[name] for name in names]
                    for step, value in read_curve(study.folder_of(trial.number)):
                        writer.writerow([trial.number, seed, step, value, *point])


def rows_overrides(rows: str, folder: Path) -> list[str]:
    """Return the overrides that name a set of rows; write it to a file if needed."""
    if rows == "python_docs":
        return []
    path = folder / "functions.jsonl"
    pairs = list(functions())
    random.Random(0).shuffle(pairs)
    with path.open("w", encoding="utf-8") as file:
        for prompt, completion in pairs[:320]:
            row = {"prompt": prompt, "completion": completion}
            file.write(json.dumps(row) + "\n")
    return [f"dataset.path={path}"]


def functions() -> Iterator[tuple[str, str]]:
    """Yield the docstring and the source of short functions of the standard library."""
    for file in sorted(Path(os.__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef):
                continue
            docstring = ast.get_docstring(node)
            code = ast.get_source_segment(source, node) or ""
            if docstring and 150 <= len(code) <= 800:
                task = f"Write the function {node.name} of Python's module {file.stem}"
                yield f"{task}: {docstring.splitlines()[0]}", code


def run_study(folder: Path, seed: int, trials: int, overrides: list[str]) -> Study:
    """Run a study without pruning; equal trial numbers have equal points in every study."""
    command = [
        sys.executable, "-m", "finetune", "-m", "hydra/sweeper=optuna",
        "hydra/sweeper/pruner=none", "hydra/sweeper/sampler=random",
        "hydra.sweeper.sampler.seed=0", f"hydra.sweeper.n_trials={trials}",
        f"hydra.sweeper.study_name=curves{seed}", f"hydra.sweep.dir={folder}",
        "hydra.sweeper.baseline_seeds=0", "hydra.sweeper.keep_adapters=1", f"seed={seed}",
        "dataset.test_fraction=0", "trainer.save_steps=0", "sample_prompts=[]", "tracker=none",
        *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    return Study.load(folder)


def read_curve(folder: RunFolder) -> list[tuple[int, float]]:
    """Return a run's evaluations after the first step; one that failed ends with nan."""
    curve = []
    for metrics in folder.metrics():
        if "eval/loss" in metrics and metrics["step"] > 0:
            curve.append((metrics["step"], metrics["eval/loss"]))
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    if result["status"] != "completed":
        curve.append((curve[-1][0] + 1 if curve else 1, math.nan))
    return curve


if __name__ == "__main__":
    main()
