"""The tokens of a run's batches, which its plan counts."""

import heapq
import itertools
from dataclasses import dataclass

from finetune.config.schema import RunConfig
from finetune.data.lengths import computed_length
from finetune.data.token_file import Example
from finetune.engine.packed.batch import packed_length
from finetune.engine.schedule import step_batches, total_steps
from finetune.run.resources import SharedResources

MOST_SHAPED = 16
"""Batches whose activations are computed on a CPU: the largest ones."""

MOST_COUNTED = 5000
"""Training batches whose tokens are counted exactly: reading the rows of more takes seconds."""

LARGEST_COUNTED = 100
"""The largest of the other batches are counted too."""


@dataclass(frozen=True)
class Work:
    """The tokens of a run."""

    batches: tuple[int, ...]
    """Tokens in each training batch, of very long runs in a part of them; a prefix that the rows
    share is counted once."""
    largest_rows: list[list[Example]]
    """The rows of the training batches that may need most."""
    evaluated_rows: list[Example]
    """The longest held-out or test rows, as many as are evaluated at once."""
    train_tokens: int
    """Tokens of the whole run without padding."""


def count_work(config: RunConfig, resources: SharedResources) -> Work:
    """Count the tokens of a run's batches.

    Args:
        config: The run's config.
        resources: Have the rows and their tokens.
    """
    rows = resources.rows(config.dataset)
    train = resources.tokens("train", rows.train, config)
    held_out = resources.tokens("eval", rows.evaluation, config)
    test = resources.tokens("test", rows.test, config)
    lengths = train.lengths
    batches: list[list[int]] = []
    for step in step_batches(lengths, config, total_steps(config, lengths)):
        batches += step.batches
    sizes = [sum(lengths[index] for index in batch) for batch in batches]
    # The order of batches is random, so that the first of them stand for all; the largest of all
    # say whether the run fits.
    counted = batches[:MOST_COUNTED]
    if len(batches) > MOST_COUNTED:
        numbers = range(MOST_COUNTED, len(batches))
        largest = heapq.nlargest(LARGEST_COUNTED, numbers, key=sizes.__getitem__)
        counted += [batches[number] for number in largest]
    batch_lengths = [packed_length([train[index] for index in b]) for b in counted]
    # Evaluation batches have rows of similar length, so the longest rows come together.
    evaluated = itertools.chain(held_out, test)
    eval_batch_rows = config.trainer.per_device_eval_batch_size
    largest_evaluation = heapq.nlargest(eval_batch_rows, evaluated, key=computed_length)
    # Engines that pad rows need most for the batch with the longest row times its rows.
    widest = heapq.nlargest(
        MOST_SHAPED,
        counted,
        key=lambda batch: len(batch) * max(lengths[index] for index in batch),
    )
    fullest = heapq.nlargest(
        MOST_SHAPED, counted, key=lambda batch: sum(lengths[index] for index in batch)
    )
    return Work(
        batches=tuple(batch_lengths),
        largest_rows=[[train[index] for index in batch] for batch in widest + fullest],
        evaluated_rows=largest_evaluation,
        train_tokens=sum(sizes),
    )
