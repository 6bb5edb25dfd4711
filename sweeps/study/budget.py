"""The budget of a study in training tokens, `hydra.sweeper.max_tokens`.

A trial stores its tokens as the user attribute `train_tokens` at each evaluation and at its end, so
that all workers count the same ones. They are those of its `result.json`: a trial that was killed
goes on from its checkpoint with the tokens up to there, so none are counted twice.
"""

from optuna.trial import FrozenTrial

from finetune.files.atomic import read_json
from sweeps.study.study import FINISHED, Study

TRAIN_TOKENS = "train_tokens"
"""User attribute of a trial, and entry of `result.json`: its training tokens without padding."""


def trained_tokens(study: Study) -> int:
    """Return the tokens that all trials of a study have trained, the running ones included."""
    return sum(_tokens_of(study, trial) for trial in study.trials())


def _tokens_of(study: Study, trial: FrozenTrial) -> int:
    tokens = trial.user_attrs.get(TRAIN_TOKENS)
    # A trial from before its tokens were stored, or one that failed before it trained.
    if tokens is None and trial.state in FINISHED:
        result = read_json(study.folder_of(trial.number).result) or {}
        tokens = result.get(TRAIN_TOKENS)
    return int(tokens or 0)


def has_spent_tokens(study: Study) -> bool:
    """Whether the study's trials have trained as many tokens as its budget allows."""
    max_tokens = study.max_tokens
    return max_tokens is not None and trained_tokens(study) >= max_tokens


def describe_tokens(study: Study) -> str:
    """Return how much of the budget is spent; empty without one."""
    max_tokens = study.max_tokens
    if max_tokens is None:
        return ""
    return f"{trained_tokens(study):,} of {max_tokens:,} tokens trained"


def describe_spent_tokens(study: Study) -> str:
    """Say that the budget is spent, and how the study goes on; empty if it is not."""
    if not has_spent_tokens(study):
        return ""
    assert study.max_tokens is not None
    larger = f"hydra.sweeper.max_tokens={2 * study.max_tokens}"
    return f"the budget is spent ({describe_tokens(study)}); {larger} goes on"
