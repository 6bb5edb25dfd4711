"""The last word on a run of a study: its test rows and sample prompts, once every choice is made."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.records import RunFolder, read_json, write_json
from finetune.samples import Samples
from finetune.supplies import Supplies
from finetune.trackers import Tracker
from finetune.trained import read_run_config

if TYPE_CHECKING:
    from finetune.evaluation import Evaluation


def say_last_word(path: str | Path, supplies: Supplies, ask: bool) -> "Evaluation | None":
    """What a completed run makes of the test rows (None: there are none); the sample prompts are asked if wanted.

    What is known already is not measured again; the run's files then hold what they would if it had been alone.
    """
    from finetune.base import load_adapter
    from finetune.evaluation import evaluate

    config, folder = read_run_config(path), RunFolder(path)
    rows = supplies.rows(config.dataset)
    test = supplies.tokens("test", rows.test, config)
    known = tested(folder)
    ask = ask and config.sample_prompts != [] and not all("after" in row for row in read_json(folder.samples) or [{}])
    if ask or (test and not known):
        with supplies.model(config) as model:
            samples = Samples(config, folder, rows, lambda: contextlib.nullcontext(model), supplies)
            if ask:
                samples.before()
            load_adapter(model, folder.adapter)
            if test and not known:
                known = evaluate(model, test, config.trainer.per_device_eval_batch_size, config.quantization)
                write_json(folder.test_rows, dataclasses.asdict(known))
            if ask:
                samples.after(Tracker(), 0)
    numbers = read_json(folder.result)
    if known is not None and "test/loss" not in numbers["metrics"]:
        numbers["metrics"] |= known.metrics("test")
        folder.log(numbers["step"], known.metrics("test"))
        write_json(folder.result, numbers)
    return known


def tested(folder: RunFolder) -> "Evaluation | None":
    """What a run has made of the test rows, row by row; None where it was not measured, or a loss is no number."""
    from finetune.evaluation import Evaluation

    known = read_json(folder.test_rows)
    if known is None or None in known["row_losses"]:
        return None
    return Evaluation(tuple(known["row_losses"]), tuple(known["row_tokens"]), known["accuracy"])
