"""The same prompts answered before and after training, so that a reader sees what was learnt."""

import contextlib
import logging
import traceback
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig, starts_as_base
from finetune.console import note_traceback, summary_line
from finetune.data.formats import first_question
from finetune.data.types import Rows
from finetune.engine.generation import generate_answers
from finetune.errors import Interrupted
from finetune.files.atomic import read_json, write_json
from finetune.files.run_folder import RunFolder
from finetune.run.resources import SharedResources
from finetune.tracking.tracker import Sample, Tracker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel


log = logging.getLogger(__name__)


HELD_OUT_PROMPTS = 2
"""How many held-out questions are asked where the config names no prompts."""


class Samples:
    """A run's `samples.json`: a list of `prompt`, `before` and `after`.

    A run never fails by its samples: an answer that could not be generated is left out of its row.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        rows: Rows,
        generation_model: "Callable[[], AbstractContextManager[PreTrainedModel]]",
        resources: SharedResources,
    ) -> None:
        self._config, self._file, self._generation_model, self._supplies = (
            config,
            folder.samples,
            generation_model,
            resources,
        )
        questions = [first_question(row) for row in rows.evaluation or rows.train]
        held_out = [question for question in questions if question is not None][:HELD_OUT_PROMPTS]
        self._prompts = held_out if config.sample_prompts is None else config.sample_prompts

    def before(self) -> None:
        """Ask the fresh adapter, which answers as its base; a resumed run has asked already."""
        if self._prompts and not self._file.exists():
            config = self._config
            bounds = (config.sample_max_new_tokens, config.sample_max_length)
            key = (config.model, config.quantization, self._prompts, *bounds)
            rows: list[Sample] = [{"prompt": prompt} for prompt in self._prompts]
            with surviving_samples("before training"):
                shared = starts_as_base(config.lora)
                answers = self._supplies.keep("base's answers", key, self._answers) if shared else self._answers()
                for row, text in zip(rows, answers, strict=True):
                    row["before"] = text
            write_json(self._file, rows)

    def after(self, tracker: Tracker, step: int) -> None:
        """Ask the trained adapter, and show both answers."""
        rows: list[Sample] = read_json(self._file) or []
        if rows:
            with surviving_samples("after training"):
                for row, text in zip(rows, self._answers(), strict=True):
                    row["after"] = text
            write_json(self._file, rows)
            tracker.log_samples(step, rows)

    def _answers(self) -> list[str]:
        config = self._config
        tokenizer = self._supplies.tokenizer(config.model)
        with self._generation_model() as model:
            return generate_answers(
                model,
                tokenizer,
                self._prompts,
                config.quantization,
                max_new_tokens=config.sample_max_new_tokens,
                max_length=config.sample_max_length,
            )


@contextlib.contextmanager
def surviving_samples(when: str) -> "Iterator[None]":
    """Turn an error into one line: samples are only shown, and the run is worth more than they are.

    An interruption passes.
    """
    try:
        yield
        return
    except Interrupted:
        raise
    except Exception as error:
        log.warning("the sample prompts are not answered %s: %s: %s", when, type(error).__name__, summary_line(error))
        note_traceback(error)
        traceback.clear_frames(error.__traceback__)  # they hold what did not fit
    from finetune.model.memory import free_memory

    free_memory()
