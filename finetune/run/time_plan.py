"""The plan of a run's time, and of a study's, from the speed of this machine's matrix products."""

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.config.schema import RunConfig
from finetune.data.token_file import Tokens
from finetune.engine.schedule import answer_steps, evaluation_rungs, total_steps
from finetune.run.evaluation_work import (
    Work,
    answer_work,
    loss_work,
    prompt_work,
)

TRAINING_PASSES = 4.0
"""Passes through the base for each trained token, in forward passes: a backward pass takes about
twice as long, and the adapter and attention the rest."""

EVALUATION_PASSES = 1.4
"""The same for each evaluated token (650 tokens/s where training has 230)."""

GENERATED_STEP_SECONDS = 0.03
"""Duration of a step of generation on a GPU, which waits for its host."""

PRUNED_SHARE = 0.5
"""Of a study's training, what pruning saves at most (docs/benchmarks.md: 14 to 47 %)."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a run by what it does, once base and rows are loaded."""

    training: float
    evaluation: float
    """The losses of the held-out rows, once."""
    evaluations: int
    """Evaluations of the held-out rows, the one before the first step included."""
    test: float
    """The test rows, with their answers and the tasks of lm-evaluation-harness."""
    answers: float
    """The sample prompts, answered once."""
    answering: float = 0.0
    """The answers to the held-out rows and the tasks of lm-evaluation-harness, once."""
    answered: int = 0
    """Evaluations that have them, the one before the first step included (`evaluation.every`)."""
    base_is_answered: bool = False
    """Whether the evaluation before the first step has them."""

    @property
    def run(self) -> float:
        """A whole run alone."""
        return self.training + self.all_evaluations + self.final

    @property
    def all_evaluations(self) -> float:
        """All evaluations of the held-out rows."""
        return self.evaluations * self.evaluation + self.answered * self.answering

    @property
    def _first_evaluation(self) -> float:
        """The evaluation before the first step."""
        return self.evaluation + self.base_is_answered * self.answering

    @property
    def final(self) -> float:
        """The final evaluation: the test rows, and the prompts before and after training."""
        return self.test + 2 * self.answers

    def study(self, trials: int, seeds: int, workers: int) -> tuple[float, float]:
        """Return the least and the most seconds of a study.

        The trials in the slots of one worker share its speed, so slots change nothing here.

        Args:
            trials: Number of trials.
            seeds: Further seeds of the baseline.
            workers: Number of workers.

        Returns:
            The seconds if pruning saves `PRUNED_SHARE` of the trials' training, and if it saves
            nothing.
        """
        # The base's evaluation is computed once for all trials.
        trial = self.training + self.all_evaluations - self._first_evaluation
        further = seeds * (trial + self.test)
        # Winner and baseline are compared on the test rows.
        final = self._first_evaluation + self.final + self.test
        shares = (1 - PRUNED_SHARE, 1.0)
        least, most = (
            (share * trials * trial + further) / workers + final for share in shares
        )
        return least, most


def plan_time(
    config: RunConfig,
    splits: Mapping[str, Tokens],
    train_tokens: int,
    weights: int,
    speed: float,
    is_gpu: bool,
    tasks: Mapping[str, Work] | None = None,
) -> TimePlan:
    """Plan the time of a run.

    Args:
        config: The run's config.
        splits: The tokens of the splits train, eval and test.
        train_tokens: Tokens of the whole run without padding.
        weights: Weights that each token is multiplied by.
        speed: Floating point operations per second.
        is_gpu: Whether the base is on a GPU.
        tasks: The work of the tasks of lm-evaluation-harness, of the documents eval and test; None:
            there are none.
    """
    token_seconds = weights / speed
    evaluated_token_seconds = EVALUATION_PASSES * token_seconds
    step_seconds = GENERATED_STEP_SECONDS

    def seconds(work: Work) -> float:
        if is_gpu:
            return work.tokens * evaluated_token_seconds + work.steps * step_seconds
        return work.duration(is_gpu) * evaluated_token_seconds

    total = total_steps(config, splits["train"].lengths)
    rungs = evaluation_rungs(config.trainer.eval_steps, total)
    held_out, test = splits["eval"], splits["test"]
    answered = answer_steps(config.evaluation, rungs) if len(held_out) else []
    tasks = tasks or {"eval": Work(), "test": Work()}
    training = train_tokens * TRAINING_PASSES * token_seconds
    if config.trainer.max_minutes is not None:
        training = min(training, 60 * config.trainer.max_minutes)
    return TimePlan(
        training=training,
        evaluation=seconds(loss_work(config, held_out)),
        evaluations=len(rungs) if len(held_out) else 0,
        test=seconds(
            loss_work(config, test) + answer_work(config, test) + tasks["test"]
        ),
        answers=seconds(prompt_work(config)),
        answering=seconds(answer_work(config, held_out) + tasks["eval"]),
        answered=len(answered),
        base_is_answered=0 in answered,
    )
