"""The time that a session leaves for its final evaluation, before `hydra.sweeper.timeout` ends.

Once the trials have ended, the winner and the baseline are evaluated on the test rows, and the
sample prompts are answered before and after training. How long that takes is estimated from the
study's own evaluations of the held-out rows, the fastest of them: in a pack an evaluation waits for
the other runs.
"""

import math

from finetune.config.schema import RunConfig
from finetune.run.evaluation_work import answer_work, loss_work, prompt_work
from finetune.run.resources import SharedResources
from sweeps.study.study import Study

FINAL_SECONDS = "final_seconds"
"""User attribute of a study: the estimate, in seconds."""

CONCLUSION_SECONDS = 10.0
"""Report, files and trackers, once all is evaluated."""


def estimate_final_seconds(
    config: RunConfig,
    resources: SharedResources,
    seconds: float,
    is_gpu: bool,
    has_answers: bool,
) -> float:
    """Estimate how long the final evaluation takes.

    Args:
        config: The config that the trials have in common.
        resources: Hold the rows and their tokens.
        seconds: Duration of an evaluation of the held-out rows.
        is_gpu: Whether the base is on a GPU.
        has_answers: Whether that evaluation had answers and tasks too (`evaluation.every`).
    """
    rows = resources.rows(config.dataset)
    held_out = resources.tokens("eval", rows.evaluation, config)
    test = resources.tokens("test", rows.test, config)
    evaluation_work = loss_work(config, held_out)
    if has_answers:
        evaluation_work += answer_work(config, held_out)
        evaluation_work += resources.task_work("eval", config)
    test_work = loss_work(config, test) + answer_work(config, test)
    test_work += resources.task_work("test", config)
    # The winner's and the baseline's test rows, the base's and the winner's answers to prompts.
    final = 2 * test_work.duration(is_gpu) + 2 * prompt_work(config).duration(is_gpu)
    return seconds * final / evaluation_work.duration(is_gpu) + CONCLUSION_SECONDS


def record_final_seconds(study: Study, seconds: float) -> None:
    """Store an estimate, unless a lower one is stored."""
    if seconds < study.optuna.user_attrs.get(FINAL_SECONDS, math.inf):
        study.optuna.set_user_attr(FINAL_SECONDS, seconds)


def reserved_seconds(study: Study, timeout: float) -> float:
    """Return the seconds before the end of `hydra.sweeper.timeout` at which training ends.

    At most half of the timeout, so that most of it is for training. Before the first evaluation
    nothing is known, and no trial could be the winner.
    """
    seconds: float = study.optuna.user_attrs.get(FINAL_SECONDS, 0.0)
    return min(seconds, timeout / 2)
