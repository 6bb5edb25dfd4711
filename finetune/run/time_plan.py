"""The plan of a run's time, and of a study's, from the speed of this machine's matrix products."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from finetune.config.schema import RunConfig
from finetune.data.token_file import Tokens
from finetune.engine.schedule import evaluation_rungs, total_steps

TRAINING_PASSES = 4.0
"""Passes through the base for each trained token, in forward passes: a backward pass takes about
twice as long, and the adapter and attention the rest."""

EVALUATION_PASSES = 1.4
"""The same for each evaluated token (650 tokens/s where training has 230)."""

GENERATED_STEP_TOKENS = 80
"""A step of generation on a CPU takes as long as an evaluation of so many tokens (measured with
SmolLM2-135M on two cores)."""

GENERATED_STEP_SECONDS = 0.03
"""Duration of a step of generation on a GPU, which waits for its host."""

PRUNED_SHARE = 0.5
"""Of a study's training, what pruning saves at most (docs/benchmarks.md: 14 to 47 %)."""


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a run by what it does, once base and rows are loaded."""

    training: float
    evaluation: float
    """One evaluation of the held-out rows."""
    evaluations: int
    """Evaluations of the held-out rows, the one before the first step included."""
    test: float
    """The test rows."""
    answers: float
    """The sample prompts, answered once."""

    @property
    def run(self) -> float:
        """A whole run alone."""
        return self.training + self.evaluations * self.evaluation + self.final

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
        trial = self.training + (self.evaluations - 1) * self.evaluation
        further = seeds * (trial + self.test)
        # Winner and baseline are compared on the test rows.
        final = self.evaluation + self.final + self.test
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
) -> TimePlan:
    """Plan the time of a run.

    Args:
        config: The run's config.
        splits: The tokens of the splits train, eval and test.
        train_tokens: Tokens of the whole run without padding.
        weights: Weights that each token is multiplied by.
        speed: Floating point operations per second.
        is_gpu: Whether the base is on a GPU.
    """
    token_seconds = weights / speed
    evaluated_token_seconds = EVALUATION_PASSES * token_seconds
    step_seconds = GENERATED_STEP_TOKENS * evaluated_token_seconds
    if is_gpu:
        step_seconds = GENERATED_STEP_SECONDS

    def evaluation_seconds(tokens: Tokens) -> float:
        rows_seconds = sum(tokens.lengths) * evaluated_token_seconds
        return rows_seconds + _answer_steps(config, len(tokens)) * step_seconds

    total = total_steps(config, len(splits["train"]))
    rungs = evaluation_rungs(config.trainer.eval_steps, total)
    has_held_out = len(splits["eval"]) > 0
    return TimePlan(
        training=train_tokens * TRAINING_PASSES * token_seconds,
        evaluation=evaluation_seconds(splits["eval"]),
        evaluations=len(rungs) if has_held_out else 0,
        test=evaluation_seconds(splits["test"]),
        answers=prompt_steps(config) * step_seconds,
    )


def _answer_steps(config: RunConfig, rows: int) -> int:
    """The steps in which answers to rows are generated, if a metric needs them."""
    if not config.evaluation.generates:
        return 0
    rows = min(rows, config.evaluation.limit or rows)
    batches = math.ceil(rows / config.trainer.per_device_eval_batch_size)
    return batches * config.evaluation.max_new_tokens


def prompt_steps(config: RunConfig) -> int:
    """The most steps in which the sample prompts are answered once."""
    if config.sample_prompts == []:
        return 0
    return config.sample_max_new_tokens or config.sample_max_length or 0
