"""The pass that evaluates: the losses of several slots' rows, without dropout."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.packed_base import PackedBase
from finetune.engine.packed.pipeline import PassSteps, interleave
from finetune.engine.packed.requests import Evaluate


@dataclass(frozen=True)
class QueuedEvaluation:
    """An evaluation pass, which a GPU may still be computing."""

    requests: Sequence[Evaluate]
    groups: Sequence[Sequence[Evaluate]]
    """The requests in the order of their rows in `figures`."""
    figures: torch.Tensor
    """Loss, answer tokens and predicted answer tokens of each row, float64 [3, rows]."""

    def read(self) -> list[Evaluation]:
        """Return the evaluation of each request's rows; waits until the GPU has computed them."""
        losses, tokens, correct = self.figures.tolist()
        evaluations: dict[int, Evaluation] = {}
        first_row = 0
        for request in itertools.chain(*self.groups):
            rows = slice(first_row, first_row + len(request.rows))
            evaluation = Evaluation(
                row_losses=tuple(losses[rows]),
                row_tokens=tuple(map(int, tokens[rows])),
                row_correct=tuple(map(int, correct[rows])),
            )
            evaluations[id(request)] = evaluation
            first_row = rows.stop
        return [evaluations[id(request)] for request in self.requests]


def queue_evaluation(
    packed_base: PackedBase, requests: Sequence[Evaluate]
) -> QueuedEvaluation:
    """Compute the losses of several slots' rows in one pass; on a GPU its kernels are queued.

    Args:
        packed_base: The base that the slots are on.
        requests: One for each slot.
    """
    for request in requests:
        request.slot.refresh_weights()
    groups = packed_base.groups(requests)
    with torch.inference_mode():
        figures = interleave([_evaluate(packed_base, group) for group in groups])
    return QueuedEvaluation(requests, groups, torch.cat(figures, 1))


def _evaluate(
    packed_base: PackedBase, requests: Sequence[Evaluate]
) -> PassSteps[torch.Tensor]:
    """Compute the loss of each row, its answer tokens, and how many of these are predicted.

    Returns:
        The three figures, float64 [3, rows].
    """
    batch = packed_base.batch(requests)
    slots = [request.slot for request in requests]
    hidden, _ = yield from packed_base.backends.current.forward(batch, slots, None)
    result = packed_base.token_losses(hidden, batch.targets, None)
    row_count = sum(len(request.rows) for request in requests)
    # In float64 the sum of a row hardly depends on the order of its terms.
    losses = result.losses.double()
    figures = torch.stack([losses, torch.ones_like(losses), result.correct.double()])
    rows = batch.target_rows.to(losses.device)
    return figures.new_zeros(3, row_count).index_add(1, rows, figures)
