"""The cache of tokens: its keys, concurrent writers, drafts left by killed processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from support.rows import CHATS, Settings, texts, tokenize

from finetune.data.encoding import IGNORED
from finetune.data.token_file import TokenWriter
from finetune.data.token_report import TokenReport
from finetune.files.atomic import create_folder

pytestmark = pytest.mark.usefixtures("fresh_cache")


def test_the_same_rows_are_tokenised_once(
    tokenizer: Any, settings: Settings, tmp_path: Path
) -> None:
    first = list(tokenize("train", CHATS, tokenizer, settings()))
    tokens = tmp_path / "cache" / "tokens"
    [kept] = tokens.glob("[!.]*")
    # What the cache holds is changed behind its back: a second call that returns it has not
    # tokenised.
    writer = TokenWriter(kept)
    columns = {"input_ids": [[1, 2, 3]], "labels": [[IGNORED, 2, 3]]}
    writer.write(pyarrow.RecordBatch.from_pydict(columns))
    writer.finish(np.array([0]), TokenReport())
    other = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}]
    touched = tokens.stat().st_mtime_ns
    assert list(tokenize("eval", CHATS, tokenizer, settings())) == other
    # Nor has anything been drawn up beside it.
    assert tokens.stat().st_mtime_ns == touched
    assert first != other


def test_the_cache_tells_apart_all_that_changes_tokens(
    tokenizer: Any, settings: Settings
) -> None:
    rows = [*CHATS[:2], *texts(2)]
    usual = list(tokenize("train", rows, tokenizer, settings()))
    assert list(tokenize("train", rows[:3], tokenizer, settings())) == usual[:3]
    assert list(tokenize("train", rows, tokenizer, settings(max_length=9))) != usual
    assert (
        "seq_lengths" in tokenize("train", rows, tokenizer, settings(packing=True))[0]
    )
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("'\n'", "': '")
    assert list(tokenize("train", rows, tokenizer, settings())) != usual
    tokenizer.chat_template = template
    assert list(tokenize("train", rows, tokenizer, settings())) == usual


def test_the_cache_tells_end_tokens_apart(tokenizer: Any, settings: Settings) -> None:
    tokenize("train", texts(2), tokenizer, settings())
    tokenizer.eos_token = "<|im_start|>"  # the same vocabulary with another end: a base and its chat model
    ends = [
        row["input_ids"][-1]
        for row in list(tokenize("train", texts(2), tokenizer, settings()))
    ]
    assert ends == [tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("size", [None, 0, 9], ids=["missing", "empty", "cut"])
@pytest.mark.parametrize("name", ["tokens.arrow", "order.npy", "report.json"])
def test_damaged_tokens_are_created_anew(
    tokenizer: Any,
    settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    size: int | None,
    packing: bool,
) -> None:
    keys = settings(max_length=64, packing=packing)
    first = list(tokenize("train", texts(9), tokenizer, keys))
    files = list((tmp_path / "cache" / "tokens").glob(f"*/{name}"))
    assert len(files) == 1 + packing
    for file in files:
        if size is None:
            file.unlink()
        else:
            os.truncate(file, size)
    assert list(tokenize("train", texts(9), tokenizer, keys)) == first
    assert len([text for text in caplog.messages if "damaged" in text]) == len(files)


RACE = """
import json, sys, tempfile, time
from pathlib import Path
from transformers import AutoTokenizer
from finetune.config.sections.dataset import DatasetSettings
from finetune.data.row_file import RowWriter, StoredRows
from finetune.data.tokens import tokenize
from finetune.data.types import Row
base, folder, me = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(base)
settings = DatasetSettings(path="x", name=None, split="train", format="auto", text_field="text", max_length=64,
    packing=False, limit=None, eval_fraction=0, eval_path=None, test_fraction=0, test_path=None, split_seed=0)
lengths = []
for turn in range(8):
    (folder / f"{turn}.{me}").touch()
    while len(list(folder.glob(f"{turn}.*"))) < 2:
        time.sleep(0.0001)
    rows_folder = Path(tempfile.mkdtemp())
    with RowWriter(rows_folder) as writer:
        for n in range(20):
            writer.append(Row({"text": f"turn {turn} row {n}"}, "rows", n + 1))
    rows = StoredRows.all_of(rows_folder, 20)
    lengths.append(sum(tokenize("train", rows, tokenizer, settings).lengths))
print(json.dumps(lengths))
"""


@pytest.mark.slow
def test_two_processes_that_tokenise_the_same_rows_at_once_both_succeed(
    tiny_base: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    command = [sys.executable, "-c", RACE, str(tiny_base), str(ready)]
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    racers = [subprocess.Popen([*command, name], **pipes) for name in ("a", "b")]
    try:
        outputs = [racer.communicate(timeout=240) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert json.loads(outputs[0][0]) == json.loads(outputs[1][0])
    left = sorted(
        folder.name for folder in (tmp_path / "cache" / "tokens").glob("[!.]*")
    )
    assert len(left) == 8, left
    assert not list((tmp_path / "cache" / "tokens").glob(".draft.*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from finetune.files.atomic import create_folder
with create_folder(Path(sys.argv[1])) as draft:
    (draft / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_drafts_of_killed_processes_are_removed_and_those_of_living_ones_are_not(
    tokenizer: Any, settings: Settings, tmp_path: Path
) -> None:
    tokens = tmp_path / "cache" / "tokens"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tokens / "rows")])
    assert done.returncode == -signal.SIGKILL
    [killed] = tokens.iterdir()
    living, elsewhere = (
        killed.with_suffix(f".{os.getppid()}"),
        killed.with_name(f".draft.rows.elsewhere{killed.suffix}"),
    )
    living.mkdir()
    elsewhere.mkdir()

    tokenize("train", texts(2), tokenizer, settings())

    left = {path for path in tokens.iterdir() if path.suffix != ".lock"}
    assert len(left) == 3  # the new tokens are the third
    assert {living, elsewhere} < left


def test_a_draft_becomes_the_folder_at_its_end_or_nothing(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "place"
    with pytest.raises(KeyboardInterrupt), create_folder(place):
        raise KeyboardInterrupt
    assert list(place.parent.iterdir()) == []
    with create_folder(place) as late:
        (late / "late").touch()
        assert not place.exists()
        place.mkdir()
        (place / "first").touch()
    assert [file.name for file in place.parent.rglob("*")] == ["place", "first"]
