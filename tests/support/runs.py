"""Read the files of runs, and train several runs in slots."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config.schema import RunConfig
from finetune.engine.interrupt import Interrupt
from finetune.engine.observer import Observer
from finetune.run.context import RunContext
from finetune.run.resources import SharedResources

if TYPE_CHECKING:
    import torch


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def losses(folder: Path) -> list[float]:
    """Return the training loss of each step of a run that logs every step."""
    rows = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [row["train/loss"] for row in rows if "train/grad_norm" in row]


def final(folder: Path) -> dict[str, Any]:
    """Return the content of a run's `result.json`."""
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def train_in_slots(
    configs: list[RunConfig],
    folder: Path,
    slots: int,
    resources: Any = None,
    observers: dict[int, Any] | None = None,
    errors: dict[int, Exception] | None = None,
) -> list[Path]:
    """Train runs in so many slots of one process, each in a folder of its own; errors are taken
    where asked for."""
    from finetune.files.run_folder import RunFolder
    from finetune.run.run import run_steps
    from sweeps.study.pack import PackedRun, train_together

    shared = resources or SharedResources()
    places = [folder / str(number) for number in range(len(configs))]

    def work(number: int, packed_with: set[str]) -> Any:
        observer = (observers or {}).get(number, Observer())
        part = RunContext(
            observer, shared, interactive=False, slots=slots, packed_with=packed_with
        )
        try:
            yield from run_steps(configs[number], RunFolder(places[number]), part)
        except Exception as error:
            if errors is None:
                raise
            errors[number] = error

    def lanes() -> Iterator[Any]:
        for number, place in enumerate(places):
            place.mkdir(parents=True)
            packed_with: set[str] = set()
            yield PackedRun(
                place.name, work(number, packed_with), place / "train.log", packed_with
            )

    waiting = lanes()
    assert train_together(lambda: next(waiting, None), slots) == len(configs)
    return places


Tiny = Callable[..., RunConfig]
SHORT = (
    "trainer.max_steps=5",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
    "trainer.per_device_train_batch_size=2",
    "dataset.max_length=64",
)
Alone = Callable[[RunConfig], list[float]]
NONE, NF4, TRL, PACKED = (
    "quantization=none",
    "quantization=nf4",
    "trainer.engine=trl",
    "trainer.engine=packed",
)
Tiny = Callable[..., RunConfig]


def saved_adapter(folder: Path) -> "torch.Tensor":
    """All adapter weights of a run in one vector."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def interrupt_and_resume(config: RunConfig, folder: Path, step: int) -> None:
    """Interrupt a run after a step, as Ctrl-C does, and resume it."""
    import pytest

    from finetune.errors import Interrupted
    from finetune.run.run import run

    interrupt = Interrupt()

    class Interrupting(Observer):
        def on_step(self, number: int) -> bool:
            # It is asked at the next step.
            interrupt.requested = number == step - 1
            return False

    context = RunContext(Interrupting(), interactive=False, interrupt=interrupt)
    with pytest.raises(Interrupted):
        run(config, folder, context)
    run(config, folder, RunContext(interactive=False))
