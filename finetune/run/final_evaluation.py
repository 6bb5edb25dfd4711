"""The last word on a run of a study: its test rows and sample prompts, once every choice is made."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.engine.steps import drive
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import RunFolder
from finetune.run.load import read_run_config
from finetune.run.resources import SharedResources
from finetune.run.samples import Samples, surviving_samples
from finetune.tracking.tracker import Tracker

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedModel

    from finetune.engine.evaluation import Evaluation


def evaluate_finished_run(path: str | Path, resources: SharedResources, ask: bool) -> "Evaluation | None":
    """What a completed run makes of the test rows (None: there are none); the sample prompts are asked if wanted.

    What is known already is not measured again; the run's files then hold what they would if it had been alone.
    """
    from finetune.model.adapter import load_adapter

    config, folder = read_run_config(path), RunFolder(path)
    rows = resources.rows(config.dataset)
    test = resources.tokens("test", rows.test, config)
    known = read_test_evaluation(folder)
    ask = ask and config.sample_prompts != [] and not all("after" in row for row in read_json(folder.samples) or [{}])
    measures = bool(test) and not known
    if ask or measures:
        with (
            contextlib.nullcontext() if measures else surviving_samples("after training"),
            _fresh(config, folder, resources, test) as (model, measure, generation_model),
        ):
            samples = Samples(config, folder, rows, generation_model, resources)
            if ask:
                samples.before()
            load_adapter(model, folder.adapter)
            if measures:
                known = measure()
                write_json(folder.test_rows, dataclasses.asdict(known))
            if ask:
                samples.after(Tracker(), 0)
    numbers = read_json(folder.result)
    if known is not None and "test/loss" not in numbers["metrics"]:
        numbers["metrics"] |= known.metrics("test")
        folder.log(numbers["step"], known.metrics("test"))
        write_json(folder.result, numbers)
    return known


def read_test_evaluation(folder: RunFolder) -> "Evaluation | None":
    """What a run has made of the test rows, row by row; None where it was not measured, or a loss is no number."""
    from finetune.engine.evaluation import Evaluation

    known = read_json(folder.test_rows)
    if known is None or None in known["row_losses"]:
        return None
    return Evaluation(tuple(known["row_losses"]), tuple(known["row_tokens"]), known["accuracy"])


Speaking = Callable[[], AbstractContextManager["PreTrainedModel"]]


@contextlib.contextmanager
def _fresh(
    config: RunConfig, folder: RunFolder, resources: SharedResources, test: "Dataset"
) -> "Iterator[tuple[PeftModel, Callable[[], Evaluation], Speaking]]":
    """A fresh adapter for the run's: its model, what measures the test rows by it, and the model to be asked.

    By the engine that trained the run: another's numbers would differ in their last digits.
    """
    if read_json(folder.result)["engine"] == "packed":
        from finetune.engine.packed.training import PackedTraining

        with resources.slot(config) as place:
            training = PackedTraining(config, place(), test, 1)
            yield training.model, lambda: drive(training.evaluate(test)), training.generation_model
    else:
        from finetune.engine.evaluation import evaluate

        with resources.model(config) as model:
            batch_size = config.trainer.per_device_eval_batch_size
            measure = functools.partial(evaluate, model, test, batch_size, config.quantization)
            yield model, measure, lambda: contextlib.nullcontext(model)
