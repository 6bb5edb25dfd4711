"""A run whose process is killed at an evaluation."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from finetune.config.schema import RunConfig
from finetune.engine.observer import Observer, Rung
from finetune.run.context import RunContext
from finetune.run.run import run
from finetune.tracking.tracker import Label

SUPPORT = Path(__file__).resolve().parent


class Dies(Observer):
    """Ends the process at once at the third evaluation, without a word to trackers."""

    def should_prune(self, rung: Rung) -> bool:
        if rung.index == 3:
            # Trackio writes from a thread, twice in a second.
            time.sleep(2)
            os._exit(9)
        return False


def run_until_killed(
    config: RunConfig, folder: Path, label: Label | None = None
) -> None:
    """Train a run in a process of its own, which dies at its third evaluation."""
    label = label or Label()
    content = {"config": config.to_dict(), "name": label.name, "group": label.group}
    order = folder.with_name("order.json")
    order.write_text(json.dumps(content))
    code = (
        f"import sys; sys.path.insert(0, {str(SUPPORT.parent)!r})\n"
        "from support.killed_runs import die\n"
        "die(*sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, str(order), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 9, ended.stderr


def die(order: str, folder: str) -> None:
    content = json.loads(Path(order).read_text())
    config = RunConfig.from_dict(content["config"])
    label = Label(name=content["name"], group=content["group"])
    run(config, folder, RunContext(Dies(), label=label))
