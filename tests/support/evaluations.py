"""Evaluations made of numbers, for tests of what is said about them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.engine.evaluation import Evaluation


def evaluation(
    losses: Any, tokens: Sequence[int], correct: Sequence[int] | None = None
) -> Evaluation:
    """An evaluation with these summed losses, tokens and right tokens of each row."""
    row_correct = correct if correct is not None else [0] * len(tokens)
    return Evaluation(
        tuple(np.asarray(losses, dtype=float).tolist()),
        tuple(tokens),
        tuple(row_correct),
    )


def evaluations(losses: Any, tokens: Sequence[int]) -> list[Evaluation]:
    """One evaluation for each seed of losses `[seeds, rows]`."""
    return [evaluation(row, tokens) for row in np.atleast_2d(losses)]
