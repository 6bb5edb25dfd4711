"""Fixtures of all tests: a tiny random base with a real tokenizer, configs, commands."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("WANDB_API_KEY", None)

os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read when trackio is imported


from support.bad_input import Workplace
from support.commands import LIGHT_IMPORTS, Station
from support.configs import compose, tiny_overrides
from support.runs import losses
from support.schemas import check_written
from support.tiny_base import make_tiny_base

from finetune.config.schema import RunConfig
from finetune.console import quiet_libraries

quiet_libraries()


LONGEST = """
test_options test_notebook
test_kills test_study_database test_training test_pack test_study test_launcher test_run
test_learning_rate test_memory_plan test_commands test_bank test_samples test_pack_order
test_multimodal test_confirm test_samplers test_packed_study test_bad_config test_kernels
test_resources test_trackers test_decoder test_report_page test_selection test_publish_wandb test_promotion
test_compiled_kernels test_workers test_faults test_lost_workers test_wandb_study test_packaged test_queue
test_advice_rates test_recorded_pass test_row_chunks test_cpu_activations test_architectures test_api
""".split()
"""The files that take longest begin first, so that neither of two processes is idle at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs and use one thread, so that runs repeat bit for bit; `pytest -m gpu` uses the GPU.

    Models of a few thousand weights gain nothing from more threads, and lose much where two test
    processes share two cores. PyTorch and Triton read the variables when they are imported.
    """
    config.option.loadscopereorder = (
        False  # pytest-xdist would begin with what has most tests
    )
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # the GPU kernels run on the CPU
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="module", autouse=True)
def _cheap_collections() -> None:
    """Spare the garbage collector what earlier test files have left: libraries, tests, reports.

    Runs free memory by collections, each of which would take a second in a process of all tests.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep caches out of the user's folders; FINETUNE_CACHE may name one with the packaged model."""
    os.environ.setdefault("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    os.environ["WANDB_DATA_DIR"] = str(
        tmp_path_factory.mktemp("wandb")
    )  # copies of artifacts


@pytest.fixture(autouse=True)
def _written_as_described(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold what a test has written in its folder against the JSON Schemas."""
    if "tmp_path" not in request.fixturenames:
        yield
        return
    folder: Path = request.getfixturevalue("tmp_path")
    yield
    check_written(folder)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a test an empty cache, without tokens from other tests or older code."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a byte-level BPE tokenizer with a ChatML
    template, whose padding token is its end token.
    """
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def tiny(tiny_base: Path) -> Callable[..., RunConfig]:
    """Composes a config of seconds: the tiny base, few short rows, no tracker; further overrides
    win."""

    def make(*overrides: str) -> RunConfig:
        return compose(
            *tiny_overrides(tiny_base), "optimizer.learning_rate=1e-3", *overrides
        )

    return make


@pytest.fixture(scope="session")
def station(
    tmp_path_factory: pytest.TempPathFactory, _own_cache: None
) -> Iterator[Station]:
    """Starts commands that train, from a process that has imported torch."""
    commands = Station(tmp_path_factory.mktemp("station"))
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def light_station(
    tmp_path_factory: pytest.TempPathFactory, _own_cache: None
) -> Iterator[Station]:
    """Starts commands that end before torch is imported."""
    commands = Station(tmp_path_factory.mktemp("light_station"), LIGHT_IMPORTS)
    yield commands
    commands.close()


@pytest.fixture
def alone(tmp_path: Path) -> Callable[[RunConfig], list[float]]:
    """Train one run by itself and return its training losses."""
    from finetune.run.context import RunContext
    from finetune.run.run import run

    def train(config: RunConfig) -> list[float]:
        folder = tmp_path / "alone" / str(len(list(tmp_path.glob("alone/*"))))
        run(config, folder, RunContext(interactive=False))
        return losses(folder)

    return train


@pytest.fixture
def workplace(tmp_path: Path, light_station: Station) -> Workplace:
    """An empty working directory for commands that must be refused."""
    cwd, aside = tmp_path / "cwd", tmp_path / "aside"
    cwd.mkdir()
    aside.mkdir()
    return Workplace(cwd, aside, light_station)
