"""What a database and the sampler cost a study of many workers and many trials; nothing trains.

    python benchmarks/many_workers.py --storage postgresql://user@host/db [--workers 64] [--rest 0]
    python benchmarks/many_workers.py --memory

The workers claim, suggest, report and record by the project's own code. A trial's objective is
computed from its parameters, so that a worker does nothing else than ask, report four rungs and
tell. Several machines are simulated by a folder for each, which share nothing but the database.
For each size, a new study is given that number of finished trials by SQL, and the same number of
waiting ones as it would have in all; then the workers train for a while.

`ask` is the time from a free slot to the trial's point (claim, sampler and their writes), `report`
that of one rung (write it, read the others', ask the pruner), `tell` that of the outcome. `sampler`
is the part of `ask` that Optuna's sampler takes. `--rest` are seconds that a trial sleeps at each
rung: without, the workers keep the database busy all the time.

The schema of the database is emptied before each study: name one that holds nothing else.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = (100, 1000, 3000, 10_000)
RUNGS = 4
SPACE = {
    "lora.r": "choice(4,8,16,32,64)",
    "lora.alpha": "choice(8,16,32,64)",
    "lora.dropout": "interval(0.0,0.15)",
    "optimizer.learning_rate": "tag(log,interval(1e-4,1e-2))",
}


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--storage", help="the database's address")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--machines", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument(
        "--total", type=int, default=10_000, help="n_trials of each study"
    )
    parser.add_argument("--seconds", type=float, default=30, help="time for each size")
    parser.add_argument(
        "--rest", type=float, default=0, help="seconds of sleep at a rung"
    )
    parser.add_argument("--memory", action="store_true", help="of a worker that trains")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory()
        return
    columns = ("ask", "sampler", "report", "tell")
    heads = " | ".join(f"{name} p50, p99 (ms)" for name in columns)
    print(
        f"| trials | trials/s | {heads} | first read (ms) | CPU of server, worker (ms a trial) |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        print(f"| {size} | {measure(arguments, size, columns)} |", flush=True)


def measure(arguments: argparse.Namespace, size: int, columns: tuple[str, ...]) -> str:
    """The cells of one size."""
    empty_schema(arguments.storage)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        session = make_study(arguments, directory / "0", size)
        # Forked: the workers share their imports, and none has a connection yet.
        context = multiprocessing.get_context("fork")
        begin = context.Barrier(arguments.workers + 1)
        workers = [
            context.Process(
                target=work, args=(session, directory, index, begin, arguments)
            )
            for index in range(arguments.workers)
        ]
        for worker in workers:
            worker.start()
        begin.wait()  # all have connections, and have read all trials
        end = time.time() + arguments.seconds
        before = server_cpu(), children_cpu(workers)
        time.sleep(arguments.seconds)
        after = server_cpu(), children_cpu(workers)
        for worker in workers:
            worker.join()
        times = read_times(directory, end - arguments.seconds)
        first = quantile(read_times(directory, 0)["first read"], 0.5)
    trials = len(times["tell"])
    cpu = [1000 * (b - a) / max(trials, 1) for a, b in zip(before, after, strict=True)]
    cells = [f"{trials / arguments.seconds:.1f}"]
    for name in columns:
        cells.append(
            f"{quantile(times[name], 0.5):.0f}, {quantile(times[name], 0.99):.0f}"
        )
    return " | ".join([*cells, f"{first:.0f}", f"{cpu[0]:.0f}, {cpu[1]:.0f}"])


def quantile(seconds: list[float], share: float) -> float:
    """A quantile in milliseconds."""
    if len(seconds) < 2:
        return 1000 * max(seconds, default=math.nan)
    return (
        1000
        * statistics.quantiles(seconds, n=100, method="inclusive")[
            round(share * 100) - 1
        ]
    )


def make_study(arguments: argparse.Namespace, folder: Path, finished: int) -> Any:
    """Begin a study with its total, of which some trials have ended; return its session."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from finetune.config.paths import CONF
    from finetune.config.schema import RunConfig
    from sweeps.space.settings import StudySettings
    from sweeps.space.space import Space
    from sweeps.study.creation import create_or_resume
    from sweeps.study.engine_choice import EngineChoice
    from sweeps.study.session import Session
    from sweeps.study.terms import study_terms
    from sweeps.study.waiting import enqueue_trials

    with initialize_config_dir(str(CONF)):
        config = compose("config", ["hydra/sweeper=optuna"], return_hydra_config=True)
    values: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
    del values["_target_"]
    values |= {"study_name": "many", "params": SPACE, "direction": "minimize"}
    values |= {"n_trials": arguments.total, "storage": arguments.storage}
    settings = StudySettings.from_sweeper(values)
    space = Space.parse(SPACE, [])
    common = RunConfig.from_hydra(compose_run())
    context: Any = None
    session = Session(
        folder,
        settings,
        space,
        config,
        context,
        common,
        None,
        EngineChoice("packed", slots=1),
    )
    terms = study_terms(common, space, settings, "")
    study = create_or_resume(
        folder, settings, arguments.storage, terms, space.distributions
    )
    enqueue_trials(study, max(arguments.total, finished), [])
    finish_by_sql(arguments.storage, space, finished)
    return session


def compose_run() -> Any:
    """The config of a run, as Hydra composes it."""
    from hydra import compose, initialize_config_dir

    from finetune.config.paths import CONF

    with initialize_config_dir(str(CONF)):
        return compose("config", ["tracker=none"])


def finish_by_sql(address: str, space: Any, count: int) -> None:
    """Give the first trials of the database parameters, reports and values."""
    from optuna.distributions import distribution_to_json
    from sqlalchemy import text

    from sweeps.study.storage import open_storage

    storage: Any = open_storage(address, Path())
    chosen = f"from trials where number < {count}"
    draw = random.Random(0)
    with storage._backend.engine.begin() as connection:
        for name, distribution in space.distributions.items():
            encoded = distribution_to_json(distribution)
            value = "floor(random() * 4)"
            if not name.endswith((".r", ".alpha")):
                low, high = distribution.low, distribution.high
                value = f"{low} + random() * {high - low}"
            connection.execute(
                text(
                    "insert into trial_params (trial_id, param_name, param_value, distribution_json)"
                    f" select trial_id, :name, {value}, :encoded {chosen}"
                ),
                {"name": name, "encoded": encoded},
            )
        for rung in range(1, RUNGS + 1):
            connection.execute(
                text(
                    "insert into trial_intermediate_values (trial_id, step, intermediate_value,"
                    f" intermediate_value_type) select trial_id, {rung},"
                    f" 3 - 0.1 * {rung} + random() * 0.3, 'FINITE' {chosen}"
                )
            )
        connection.execute(
            text(
                "insert into trial_values (trial_id, objective, value, value_type)"
                f" select trial_id, 0, 2.5 + random() * 0.3, 'FINITE' {chosen}"
            )
        )
        for key, content in (
            ("steps", "60"),
            ("step", "60"),
            ("train_tokens", "90000"),
            ("starts", "[0]"),
        ):
            connection.execute(
                text(
                    "insert into trial_user_attributes (trial_id, key, value_json)"
                    f" select trial_id, '{key}', '{content}' {chosen}"
                )
            )
        connection.execute(
            text(
                "update trials set state = 'COMPLETE', datetime_start = now(),"
                f" datetime_complete = now() where number < {count}"
            )
        )
        connection.execute(text(f"select setseed({draw.random()})"))
    with storage._backend.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(
            text("vacuum analyze")
        )
    storage._backend.engine.dispose()


def empty_schema(address: str) -> None:
    """Remove all tables of the database."""
    from sqlalchemy import create_engine, text

    engine = create_engine(address.replace("postgresql://", "postgresql+psycopg2://"))
    with engine.begin() as connection:
        connection.execute(text("drop schema public cascade"))
        connection.execute(text("create schema public"))
    engine.dispose()


def work(
    session: Any, directory: Path, index: int, begin: Any, arguments: argparse.Namespace
) -> None:
    """One worker: trials until the time is over."""
    import dataclasses

    import optuna

    from sweeps.study import suggestion, worker
    from sweeps.study.study import Study
    from sweeps.study.trial import TrialRunner

    folder = directory / str(index % arguments.machines)
    folder.mkdir(exist_ok=True)
    session = dataclasses.replace(session, folder=folder)
    clock = Clock(directory / f"{index}.jsonl")
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    class SimulatedTrial(TrialRunner):
        """A trial whose run is replaced by its reports."""

        def suggest_overrides(self) -> list[str]:
            overrides = super().suggest_overrides()
            clock.stop("ask")
            return overrides

        def _train(self, overrides: list[str]) -> Any:
            yield from ()
            simulate(self, clock, arguments.rest)

        def _record(self, outcome: Any) -> None:
            clock.start()
            super()._record(outcome)

    suggest = suggestion.suggest_point

    def timed_suggest(*positional: Any) -> Any:
        with clock.measured("sampler"):
            return suggest(*positional)

    from sweeps.study import trial

    # Their names in the modules that call them.
    vars(trial)["suggest_point"] = timed_suggest
    vars(worker)["TrialRunner"] = SimulatedTrial
    study = Study(folder, session.settings.study_name, session.address)
    with clock.measured("first read"):
        study.trials()
    begin.wait()
    end = time.time() + arguments.seconds
    source = worker._TrialSource(session, study)
    with worker._kept_alive(study, source.interrupt):
        while time.time() < end:
            clock.start()
            run = source.next_run(lambda trial: True)
            if run is None:
                break
            for _ in run.steps:
                pass
            clock.stop("tell")


class Clock:
    """Writes how long a worker's calls take."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = 0.0

    def start(self) -> None:
        self._began = time.monotonic()

    def stop(self, name: str) -> None:
        self._write(name, time.monotonic() - self._began)

    @contextlib.contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Write how long the block takes."""
        began = time.monotonic()
        yield
        self._write(name, time.monotonic() - began)

    def _write(self, name: str, seconds: float) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps([time.time(), name, seconds]) + "\n")


def simulate(runner: Any, clock: Clock, rest: float) -> None:
    """Report a trial's rungs, and write its result."""
    from finetune.engine.observer import Rung
    from finetune.files.atomic import write_json
    from sweeps.study.pruning import PruningObserver

    session, trial = runner._session, runner.trial
    observer = PruningObserver(
        session, runner._study, trial, runner._claim.trial_id, runner._interrupt
    )
    rate = math.log10(trial.params["optimizer.learning_rate"])
    status, step, loss = "completed", 0, math.nan
    for index in range(1, RUNGS + 1):
        time.sleep(rest)
        step = 15 * index
        observer.on_step(step)
        loss = 2.5 + (rate + 3) ** 2 + 0.5 / index + random.gauss(0, 0.02)
        metrics = {"eval/loss": loss, "objective": loss}
        rung = Rung(index, step, 15 * RUNGS, metrics, train_tokens=1500 * step)
        with clock.measured("report"):
            observer.on_rung(rung)
            is_pruned = observer.should_prune(rung)
        if is_pruned:
            status = "pruned"
            break
    result = {"status": status, "step": step, "metrics": {"eval/loss": loss}}
    write_json(runner._folder.result, result)


def read_times(directory: Path, since: float) -> dict[str, list[float]]:
    """The measured times of all workers after a moment, by what took them."""
    times: dict[str, list[float]] = defaultdict(list)
    for file in directory.glob("*.jsonl"):
        for line in file.read_text().splitlines():
            moment, name, seconds = json.loads(line)
            if moment >= since:
                times[name].append(seconds)
    return times


def print_memory() -> None:
    """Memory of a worker as a user has it: a study of two workers in processes of their own."""
    import psutil

    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "finetune",
            "-m",
            "hydra/sweeper=optuna",
            "search=lora",
        ]
        command += [
            "trainer=debug",
            "hydra.sweeper.n_jobs=2",
            "hydra.sweeper.n_trials=40",
        ]
        quiet: dict[str, Any] = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.DEVNULL,
        }
        study = subprocess.Popen([*command, "tracker=none"], cwd=directory, **quiet)
        peaks: dict[int, int] = defaultdict(int)
        names: dict[int, str] = {}
        end = time.monotonic() + 240
        while time.monotonic() < end and study.poll() is None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(study.pid)
                for process in (root, *root.children(recursive=True)):
                    used = process.memory_full_info().uss
                    peaks[process.pid] = max(peaks[process.pid], used)
                    names[process.pid] = " ".join(process.cmdline()[1:4])
            time.sleep(0.5)
        study.terminate()
        study.wait()
    print("| process | memory of its own (MiB, peak) |\n|---|---|")
    for pid, peak in peaks.items():
        print(f"| {names[pid][:60]} | {peak / 2**20:.0f} |")


def server_cpu() -> float:
    """CPU seconds of PostgreSQL's processes on this machine."""
    import psutil

    total = 0.0
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "postgres":
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:2])
    return total


def children_cpu(workers: list[Any]) -> float:
    """CPU seconds of the workers."""
    import psutil

    return sum(sum(psutil.Process(worker.pid).cpu_times()[:2]) for worker in workers)


if __name__ == "__main__":
    main()
