"""Runs from Python: what the commands give, in a process that is as it was afterwards."""

import contextlib
import gc
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from support.commands import Station
from support.configs import tiny_overrides
from support.loaded_models import loaded_models
from support.runs import write_jsonl

import finetune
import sweeps
from finetune.console import ignore_warnings, quiet_libraries
from finetune.data.types import Prompt
from finetune.generate import answer_prompts
from finetune.in_process import in_process

SHORT = [
    "trainer.max_steps=20",
    "sample_max_new_tokens=4",
    "optimizer.learning_rate=0.02",
]
ANOTHER = {
    "prompt": "What does heapq.heappush do?",
    "completion": "Push item onto heap.",
}


@pytest.fixture(scope="module")
def overrides(tiny_base: Path) -> list[str]:
    return [*tiny_overrides(tiny_base), *SHORT]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of the runs."""
    with contextlib.chdir(tmp_path_factory.mktemp("api")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def run(place: Path, overrides: list[str]) -> finetune.Run:
    return finetune.train(*overrides)


@pytest.fixture(scope="module")
def by_command(
    run: finetune.Run, place: Path, overrides: list[str], station: Station
) -> finetune.Run:
    """The same run, by the command."""
    done = station.run(*overrides, "hydra.run.dir=by_command", cwd=place)
    assert done.returncode == 0, done.stderr
    return finetune.load(place / "by_command")


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if "second" not in name}


def test_a_run_from_python_is_the_commands(
    run: finetune.Run, by_command: finetune.Run
) -> None:
    assert run.status == by_command.status == "completed"
    assert without_seconds(run.metrics) == without_seconds(by_command.metrics)
    assert run.objective == by_command.objective == run.metrics["eval/loss"]
    weights = "adapter/adapter_model.safetensors"
    assert (run.path / weights).read_bytes() == (by_command.path / weights).read_bytes()
    names = {path.name for path in run.path.iterdir()}
    assert names == {path.name for path in by_command.path.iterdir()}
    log = (run.path / "train.log").read_text()
    assert "completed: default" in log


def test_a_run_has_the_commands_default_folder(run: finetune.Run, place: Path) -> None:
    assert run.path.parent == place / "outputs" / "runs" / "default"
    assert finetune.load("default") == run
    assert repr(run) == f"<Run outputs/runs/default/{run.path.name}: completed>"


def test_the_history_has_a_row_for_each_logged_step(run: finetune.Run) -> None:
    history = run.history()

    assert list(history["step"]) == list(range(21))
    assert history["eval/loss"].iloc[-1] == run.metrics["eval/loss"]
    assert history["train/loss"].notna().sum() == 20
    lines = [
        json.loads(line)
        for line in (run.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert set(history.columns) == {name for line in lines for name in line}


def test_a_second_run_is_equal_and_neither_keeps_its_base(
    run: finetune.Run, overrides: list[str], place: Path
) -> None:
    """The second one in a thread, where no signal handler can be installed."""
    before = loaded_models()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(finetune.train, *overrides).result()

    assert second.path != run.path
    assert without_seconds(second.metrics) == without_seconds(run.metrics)
    assert loaded_models() == before
    assert gc.get_freeze_count() == 0
    assert handlers == [
        signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    ]


def test_hydra_and_logging_of_the_user_are_as_they_were(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler of mode "w" is closed by `dictConfig`, and a closed one writes no more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("a: 1\n")
    root, child = logging.getLogger(), logging.getLogger("finetune.run")
    handler = logging.FileHandler(tmp_path / "mine.log", mode="w")
    root.addHandler(handler)
    before = root.handlers[:], root.level, child.level
    try:
        with initialize_config_dir(str(tmp_path / "mine")):
            application = GlobalHydra.instance().hydra
            run = finetune.train(*overrides, "trainer.max_steps=1")
            run.generate(["a"], max_new_tokens=1)
            assert GlobalHydra.instance().hydra is application
            assert compose("config") == {"a": 1}
        assert (root.handlers, root.level, child.level) == before
        root.warning("a line of mine")
    finally:
        root.removeHandler(handler)
        handler.close()
    assert (tmp_path / "mine.log").read_text() == "a line of mine\n"
    assert "HYDRA_FULL_ERROR" not in os.environ


def random_numbers() -> list[float]:
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    return drawn


def test_what_libraries_change_for_the_process_is_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TRL's trainer seeds all random numbers, so a loop's would be the same in each round."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    client = logging.getLogger("httpx")
    before = dict(os.environ), warnings.filters[:], client.level, random_numbers()
    with in_process():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        os.environ["WANDB_SERVICE"] = "socket"
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        client.setLevel(logging.ERROR)
        quiet_libraries()
        ignore_warnings("what a call ignores")
        warnings.filterwarnings("ignore", "what a library ignores")
    ignored = warnings.filters[0]
    warnings.filters.remove(ignored)  # type: ignore[attr-defined]
    after = dict(os.environ), warnings.filters[:], client.level, random_numbers()
    assert after == before
    assert "what a library" in str(ignored[1])


def test_a_second_call_at_the_same_time_is_refused(run: finetune.Run) -> None:
    with (
        in_process(),
        pytest.raises(finetune.ConfigError, match="another run or study"),
    ):
        run.generate(["a"])
    assert len(run.generate(["a"], max_new_tokens=1)) == 1


def test_answers_are_the_commands(run: finetune.Run, station: Station) -> None:
    prompts = ["What does math.gcd do in Python?", "What does heapq.heappush do?"]
    flags = ["--max-new-tokens", "5", "--system", "Be short."]
    words = [str(run.path), *flags]
    for prompt in prompts:
        words += ["--prompt", prompt]
    printed = station.run(*words, cwd=run.path, module="finetune.generate").stdout

    answers = run.generate(prompts, max_new_tokens=5, system="Be short.")

    assert "".join(f"{answer}\n" for answer in answers) == printed
    assert len(answers) == 2
    assert answers != run.generate(
        prompts, max_new_tokens=5, system="Be short.", base=True
    )


def test_an_evaluation_is_the_commands(
    run: finetune.Run, tmp_path: Path, station: Station
) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [ANOTHER])
    words = [str(run.path), "--data", str(data), "--json"]
    printed = station.run(*words, cwd=tmp_path, module="finetune.evaluate").stdout

    assert run.evaluate(data) == json.loads(printed)


def test_a_merged_model_is_the_commands(
    run: finetune.Run, tmp_path: Path, station: Station
) -> None:
    words = [str(run.path), "--to", str(tmp_path / "by_command")]
    done = station.run(*words, cwd=tmp_path, module="finetune.merge")
    assert done.returncode == 0, done.stderr

    merged = run.merge(tmp_path / "merged")

    assert merged.path == tmp_path / "merged"
    assert merged.verdict == done.stdout.splitlines()[-1]
    weights = "model.safetensors"
    assert (merged.path / weights).read_bytes() == (
        tmp_path / "by_command" / weights
    ).read_bytes()


MISTAKES = [
    ["lora.q=8"],
    ["lora=r9"],
    ["lora.r=0"],
    ["lora=r8,r16"],
    ["lora.r"],
    ["train"],
    ["model.name_or_path=./nowhere"],
    ["resume=nothing"],
    ["resume=latest", "lora.r=8"],
    ["hydra.sweeper.n_trials=3"],
    ["search=lora"],
    ["hydra.run.dir=/dev/null/run"],
    ["+model.token=hf_abcdefSECRETghijkl"],
]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_a_mistake_raises_the_commands_line(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    light_station: Station,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = light_station.run(*words, cwd=tmp_path)
    with pytest.raises(finetune.ConfigError) as refused:
        finetune.train(*words)

    assert done.stderr.splitlines()[-1] == f"error: {refused.value}"
    assert list(tmp_path.iterdir()) == []


def test_tab_completes_the_names_that_are_imported_late() -> None:
    for package in (finetune, sweeps):
        assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("word", [None, 7, ["lora.r=8"], Path("a")], ids=repr)
def test_what_is_no_text_is_refused(word: Any) -> None:
    with pytest.raises(finetune.ConfigError, match="must be a text KEY=VALUE"):
        finetune.train(word)
    with pytest.raises(finetune.ConfigError, match=r"^: must be KEY=VALUE; see"):
        finetune.train("")


@pytest.mark.parametrize("word", ["-m", "--cfg=job", "--help", "--version"])
def test_flags_of_the_command_line_are_refused(word: str) -> None:
    with pytest.raises(finetune.ConfigError, match=rf"^{word}: is a flag"):
        finetune.train(word)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda run: run.generate("text"), "prompts=text: must be a list of texts"),
        (
            lambda run: run.generate([], max_length=0),
            "max_length=0: must be a whole number, at least 1",
        ),
        (lambda run: run.generate(["a"], max_new_tokens="8"), "max_new_tokens=8: must"),
        (lambda run: run.generate(["a", " "]), "prompts[1]= : must be a text that"),
        (lambda run: run.generate([7]), "prompts[0]=7: must be a text that"),
        (lambda run: run.generate(7), "prompts=7: must be a list of texts"),
        (lambda run: run.generate(["a"], system=7), "system=7: must be a text"),
        (lambda run: run.generate(["a"], system=""), "system=: must be a text that"),
        (
            lambda run: run.generate(["a", "b\udcff"]),
            "prompts[1]=b\\udcff: must be valid UTF-8 text",
        ),
        (
            lambda run: run.generate(["a"], system="\ud800"),
            "system=\\ud800: must be valid UTF-8 text",
        ),
        (lambda run: run.generate(["a"], temperature="hot"), "temperature=hot: must"),
        (lambda run: run.generate(["a"], top_p=0.5), "top_p=0.5: needs temperature"),
        (
            lambda run: run.generate(["a"], temperature=1, seed=True),
            "seed=true: must be a whole number, at least 0",
        ),
        (lambda run: run.merge(run.path), "exists already"),
        (lambda run: run.merge("new", dtype="int8"), "dtype=int8: "),
        (lambda run: run.evaluate("no.jsonl"), "--data=no.jsonl: "),
        (lambda run: finetune.load("nothing"), "RUN=nothing: no such run"),
    ],
)
def test_a_wrong_argument_is_refused(
    run: finetune.Run, call: Callable[[finetune.Run], Any], line: str
) -> None:
    with pytest.raises(finetune.ConfigError) as refused:
        call(run)
    assert line in str(refused.value)


def test_a_prompt_that_the_template_refuses_is_refused_before_the_base_loads(
    run: finetune.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.loading.load_base", pytest.fail)
    with pytest.raises(finetune.ConfigError, match="can't render a chat of user"):
        answer_prompts(run.path, [Prompt("", messages=[{"role": "user"}])])


def test_drawn_answers_are_those_of_their_seed(run: finetune.Run) -> None:
    first, again, other = (
        run.generate(["Hi"], max_new_tokens=8, temperature=2.0, top_p=0.9, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def interrupt_after_the_first_step(folder: Path) -> threading.Thread:
    """Send this process SIGINT, as a notebook does, once a run has logged a step."""

    def watch() -> None:
        while "train/grad_norm" not in (
            log.read_text() if (log := folder / "metrics.jsonl").exists() else ""
        ):
            if done.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGINT)

    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    thread.done = done  # type: ignore[attr-defined]
    return thread


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes_and_gives_its_memory_back(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = finetune.train(*overrides, "trainer.max_steps=100", "hydra.run.dir=whole")
    before = loaded_models()
    watcher = interrupt_after_the_first_step(tmp_path / "run")
    try:
        with pytest.raises(KeyboardInterrupt, match=r"resume=run") as interrupted:
            finetune.train(*overrides, "trainer.max_steps=100", "hydra.run.dir=run")
    finally:
        watcher.done.set()  # type: ignore[attr-defined]
        watcher.join()
    # The error lives, as in a notebook, whose last error holds its frames.
    assert interrupted.value.__traceback__ is not None
    assert loaded_models() == before
    run = finetune.load("run")
    assert run.status == "interrupted"

    resumed = finetune.train("resume=run")

    assert resumed == run
    assert resumed.status == "completed"
    assert without_seconds(resumed.metrics) == without_seconds(whole.metrics)
    assert "completed: default" in (run.path / "train.log").read_text()


CTRL_C_IN_AN_IMPORT = """
import signal, sys

class InterruptingFinder:
    # Asked for each module; the user presses Ctrl-C while one is imported.
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            # The kernel may give a signal for the process to another thread, which runs later.
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, InterruptingFinder())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import finetune
words = sys.argv[2:]
try:
    finetune.train(*words, "hydra.run.dir=interrupted", "trainer.max_steps=1000")
except KeyboardInterrupt:
    print("interrupted")
print(finetune.train(*words, "hydra.run.dir=next", "trainer.max_steps=1").status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["omegaconf.errors", "numpy.linalg", "hydra.core.plugins"]
)
def test_ctrl_c_in_an_import_leaves_a_process_in_which_the_next_call_works(
    module: str, overrides: list[str], tmp_path: Path
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CTRL_C_IN_AN_IMPORT, module, *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "completed"
    assert "interrupted" in ended.stdout, ended.stderr


def test_a_run_without_a_result_says_so(tmp_path: Path, run: finetune.Run) -> None:
    (tmp_path / "run.json").write_bytes((run.path / "run.json").read_bytes())
    killed = finetune.load(tmp_path)

    assert killed.status == "running"
    assert killed.metrics == killed.result == {}
    assert killed.objective is None
    assert killed.history().empty


def test_a_metric_that_is_no_number_is_nan(tmp_path: Path, run: finetune.Run) -> None:
    result = {"metrics": {"a": None}, "objective": [{"name": "a", "value": None}]}
    (tmp_path / "run.json").write_bytes((run.path / "run.json").read_bytes())
    (tmp_path / "result.json").write_text(json.dumps(result))
    damaged = finetune.load(tmp_path)

    assert math.isnan(damaged.metrics["a"])
    assert isinstance(damaged.objective, tuple)
    assert math.isnan(damaged.objective[0])


def test_the_package_names_what_it_has() -> None:
    assert {"train", "load", "Run"} <= set(finetune.__all__)
    for name in finetune.__all__:
        assert getattr(finetune, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        getattr(finetune, "trian")  # noqa: B009
    assert finetune.train.__doc__ is not None
