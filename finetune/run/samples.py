"""Sample prompts: answered before and after training, so that a reader sees what was learnt."""

import contextlib
import itertools
import logging
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune.config.schema import RunConfig
from finetune.console import log_traceback, summary_line
from finetune.data.prompts import first_answer, first_prompt
from finetune.data.rows import Rows
from finetune.data.types import Prompt, Row
from finetune.engine.steps import RunSteps
from finetune.errors import Interrupted
from finetune.files.atomic import read_json_list, write_json
from finetune.files.run_folder import RunFolder
from finetune.model.memory import free_memory
from finetune.run.evaluated_model import EvaluatedModel
from finetune.run.resources import SharedResources
from finetune.tracking.tracker import Sample, Tracker

log = logging.getLogger(__name__)

HELD_OUT_PROMPTS = 2
"""Number of held-out questions that are asked where the config names no prompts."""


class Samples:
    """The content of `samples.json`: a list of `prompt`, `expected`, `before` and `after`.

    A row's own answer to its question is `expected`; a prompt of the config has none.

    Samples never fail a run: an answer that could not be generated is left out of its row.

    Args:
        config: The run's config.
        folder: The run folder.
        rows: Rows to take questions from.
        model: Answers the prompts.
        resources: Share the tokenizer and the base's answers.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        rows: Rows,
        model: EvaluatedModel,
        resources: SharedResources,
    ) -> None:
        self._config = config
        self._file = folder.samples
        self._model = model
        self._resources = resources
        self._questions = _choose_questions(config, rows)
        self._prompts = [question.prompt for question in self._questions]

    @property
    def unasked(self) -> int:
        """How many prompts `before` will answer: none where a resumed run has asked already."""
        return 0 if self._file.exists() else len(self._prompts)

    @property
    def asked(self) -> int:
        """How many prompts `after` will answer."""
        return len(read_json_list(self._file))

    def before(self) -> RunSteps[None]:
        """Ask the fresh adapter. A resumed run has asked already."""
        if not self.unasked:
            return
        samples = [question.to_sample() for question in self._questions]
        with survive_samples("before training"):
            answers = yield from self._answers_before()
            for sample, answer in zip(samples, answers, strict=True):
                sample["before"] = answer
        write_json(self._file, samples)

    def after(self, tracker: Tracker, step: int) -> RunSteps[None]:
        """Ask the trained adapter, and show both answers on the tracker."""
        samples: list[Sample] = read_json_list(self._file)
        if not samples:
            return
        with survive_samples("after training"):
            answers = yield from self._answers()
            for sample, answer in zip(samples, answers, strict=True):
                sample["after"] = answer
        write_json(self._file, samples)
        tracker.log_samples(step, samples)

    def _answers_before(self) -> RunSteps[list[str]]:
        """Answers of the fresh adapter; where it equals the base, all runs share them."""
        if not self._config.lora.starts_at_zero:
            return (yield from self._answers())
        base_answers = self._resources.base_answers(self._config, self._prompts)
        return (yield from base_answers.get(self._answers))

    def _answers(self) -> RunSteps[list[str]]:
        config = self._config
        steps = self._model.generate_answers(
            self._prompts,
            self._resources.tokenizer(config.model),
            max_new_tokens=config.sample_max_new_tokens,
            max_length=config.sample_max_length,
        )
        return (yield from steps)


@dataclass(frozen=True)
class _Question:
    """A prompt, and the answer to it that is known."""

    prompt: Prompt
    expected: str | None = None

    def to_sample(self) -> Sample:
        sample = {"prompt": self.prompt.text}
        if self.expected is not None:
            sample["expected"] = self.expected
        return sample


def _choose_questions(config: RunConfig, rows: Rows) -> list[_Question]:
    """The config's prompts with the system turn that all rows share, or held-out questions."""
    if config.sample_prompts is not None:
        system = rows.shared_system
        return [_Question(Prompt(text, system)) for text in config.sample_prompts]
    questions = _questions_of(rows.evaluation or rows.train)
    return list(itertools.islice(questions, HELD_OUT_PROMPTS))


def _questions_of(rows: Iterable[Row]) -> Iterator[_Question]:
    """The first question of each row that has one."""
    for row in rows:
        prompt = first_prompt(row)
        if prompt is not None:
            yield _Question(prompt, first_answer(row))


@contextlib.contextmanager
def survive_samples(when: str) -> Iterator[None]:
    """Turn an error of the samples into a warning: they are only shown. Interruptions are raised.

    Args:
        when: "before training" or "after training", for the warning.
    """
    try:
        yield
        return
    except Interrupted:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {summary_line(error)}"
        log.warning("the sample prompts are not answered %s: %s", when, reason)
        log_traceback(error)
        traceback.clear_frames(
            error.__traceback__
        )  # they hold the memory that was too small
    free_memory()
