"""Many rows are worked on by several processes: the same results, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.matrix import further
from support.processes import children_with
from support.rows import Settings, chat, store_rows, texts
from support.runs import write_jsonl

from finetune.data import tokens
from finetune.data.row_chunks import (
    CHUNK_ROWS,
    ROWS_PER_PROCESS,
    map_chunks,
    process_limit,
)
from finetune.data.types import Row
from finetune.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_cache")]

MANY = 2 * ROWS_PER_PROCESS + 345

needs_processes = pytest.mark.skipif(process_limit() < 2, reason="needs two CPUs")


def working_children() -> list[psutil.Process]:
    """The processes that this one has spawned and that still run.

    Other tests' helpers are its children too.
    """
    return children_with("spawn_main")


def numbers_and_process(rows: Sequence[Row]) -> tuple[list[int], int]:
    return [row.number for row in rows], os.getpid()


def refuse_from_4000(rows: Sequence[Row]) -> None:
    # The later chunk fails first: the earlier one takes its time.
    if rows[0].number == 4001:
        time.sleep(1)
    if rows[0].number > 4000:
        raise ConfigError(f"{rows[0].place} is bad")


@needs_processes
def test_chunks_come_in_order_from_several_processes() -> None:
    rows = store_rows(texts(MANY))
    results = list(map_chunks(numbers_and_process, rows, "rows"))
    assert [number for numbers, _ in results for number in numbers] == [
        *range(1, MANY + 1)
    ]
    assert {len(numbers) for numbers, _ in results} == {CHUNK_ROWS, 345}
    assert os.getpid() not in {process for _, process in results}
    assert not working_children()


@needs_processes
def test_the_first_refusal_by_the_order_of_rows_is_raised() -> None:
    rows = store_rows(texts(MANY))
    with pytest.raises(ConfigError, match="row 4001 is bad"):
        list(map_chunks(refuse_from_4000, rows, "rows"))
    assert not working_children()


def test_few_rows_are_worked_on_here() -> None:
    [(numbers, process)] = map_chunks(numbers_and_process, store_rows(texts(7)), "rows")
    assert (numbers, process) == ([*range(1, 8)], os.getpid())


@needs_processes
def test_tokens_are_the_same_from_one_process_and_from_several(
    tokenizer: Any, settings: Settings
) -> None:
    rows = [chat(f"Question {n}?", f"Answer {n}." * (n % 7 + 1)) for n in range(MANY)]
    many = tokens.tokenize("train", store_rows(rows), tokenizer, settings())
    last = tokens.tokenize("train", store_rows(rows[-100:]), tokenizer, settings())
    assert len(many) == MANY
    assert many[-100:] == list(last)
    assert many.lengths[-100:] == last.lengths
    assert (many.report.rows, many.report.chats) == (MANY, MANY)


UNGUARDED = """
import sys
from pathlib import Path
from hydra import compose, initialize_config_dir
from finetune.config.paths import CONF
from finetune.config.schema import RunConfig
from finetune.data.rows import load_rows
with initialize_config_dir(str(CONF)):
    config = RunConfig.from_hydra(compose("config", [f"dataset.path={sys.argv[1]}"]))
print(len(load_rows(config.dataset).train), "rows", flush=True)
"""


@needs_processes
def test_a_script_without_a_guard_reads_many_rows(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", texts(MANY))
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    command = [sys.executable, str(script), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    most_held_out = (
        1_000  # of the default fractions, for each of the two held-out splits
    )
    held_out = sum(min(round(MANY * part), most_held_out) for part in (0.1, 0.15))
    assert done.stdout == f"{MANY - held_out} rows\n", done.stderr
    assert "Traceback" not in done.stderr


@needs_processes
@pytest.mark.parametrize("name", ["SIGKILL", *further("SIGINT", "SIGTERM")])
def test_processes_end_with_the_command_and_the_next_one_begins_anew(
    tiny_base: Path, tmp_path: Path, name: str
) -> None:
    long = [{"text": f"{n} " + "word " * 60} for n in range(MANY)]
    file = write_jsonl(tmp_path / "rows.jsonl", long)
    command = [
        sys.executable,
        "-m",
        "finetune.preview",
        f"model.name_or_path={tiny_base}",  # the packaged one is not in an empty cache
        f"dataset.path={file}",
        "--rows",
        "1",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watched = psutil.Process(process.pid)
    deadline = time.monotonic() + 90
    while (
        len(workers := watched.children(recursive=True)) < 3
    ):  # two, and a resource tracker
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    if name != "SIGKILL":
        assert (process.returncode, errors) == (3, "error: interrupted\n")
        cache = tmp_path / "cache"
        assert not [path for path in cache.glob("*/[!.]*") if "." in path.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
