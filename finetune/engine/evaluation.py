"""The loss on held-out rows: one measure for all engines and commands.

It does not depend on the batch size, draws no random numbers, and leaves the model as it was.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from finetune.config.sections.model import QuantizationSettings
from finetune.data.lengths import common_prefix_length
from finetune.data.token_file import Example
from finetune.engine.prediction import compute_prefix, predict
from finetune.engine.probes import (
    Comparison,
    Shortcut,
    base_of,
    holds,
    plain_logits,
    probe_ids,
)
from finetune.metrics.classification import Classification
from finetune.metrics.metric import Score
from finetune.model.architectures import text_config_of
from finetune.model.quantization import autocast

LOGITS_BYTES = 2**28
"""Limit of the logits of the rows that are evaluated at once; one row may exceed it."""


@dataclass(frozen=True)
class Evaluation:
    """A model's losses on the answer tokens of a set of rows."""

    row_losses: tuple[float, ...]
    """Sum of the negative log-likelihoods of each row's answer tokens, in nats."""
    row_tokens: tuple[int, ...]
    """Number of answer tokens of each row."""
    row_correct: tuple[int, ...]
    """Number of answer tokens of each row that the model finds most likely."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """Scores of answers by their names, and `SOURCE/NAME` where there are several sources."""
    classification: Classification | None = None
    """The most likely label of each row; None without the metric `classification`."""

    @property
    def tokens(self) -> int:
        """Number of answer tokens of all rows."""
        return sum(self.row_tokens)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of an answer token, in nats."""
        return math.fsum(self.row_losses) / max(self.tokens, 1)

    @property
    def accuracy(self) -> float:
        """Share of answer tokens that the model finds most likely, in [0, 1].

        Each token is predicted from the right beginning of its answer.
        """
        return sum(self.row_correct) / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        # exp overflows above 709.
        return math.exp(min(self.loss, 700.0))

    def metrics(self, split: str) -> dict[str, float]:
        """Return all values as files and trackers name them, for example `eval/loss`.

        Args:
            split: `eval` or `test`.
        """
        metrics = {f"{split}/loss": self.loss, f"{split}/accuracy": self.accuracy}
        for name, score in self.scores.items():
            metrics[f"{split}/{name}"] = score.value
        return metrics

    def score(self, name: str) -> Score | None:
        """Return the value of a metric with its parts by row; None where it has no value.

        Args:
            name: `loss`, `accuracy`, or the name of a score.
        """
        counts = self.row_tokens
        if name == "loss":
            return Score(self.loss, False, self.row_losses, counts)
        if name == "accuracy":
            correct = tuple(map(float, self.row_correct))
            return Score(self.accuracy, True, correct, counts)
        return self.scores.get(name)


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, without gradients, within the block.

    A mixture of experts returns no router logits within the block: TRL turns them on for its
    auxiliary loss, which transformers can't compute with cached keys and values.
    """
    # Module by module, because `model.train()` would change those that were in evaluation mode.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with _without_router_logits(model), torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _without_router_logits(model: torch.nn.Module) -> Iterator[None]:
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        yield
        return
    text_config = text_config_of(config)
    router_logits = getattr(text_config, "output_router_logits", None)
    # False already, or a model without experts, whose config has no such setting.
    if not router_logits:
        yield
        return
    text_config.output_router_logits = False
    try:
        yield
    finally:
        text_config.output_router_logits = router_logits


def evaluate(
    model: torch.nn.Module,
    rows: Sequence[Example],
    batch_size: int,
    quantization: QuantizationSettings,
) -> Evaluation:
    """Evaluate a causal language model on tokenised rows.

    Rows are batched by length to save padding. A prefix that all rows share (a system prompt) is
    computed once. Where the base computes rows otherwise in this way, each is computed alone. Only
    positions that predict an answer token get logits.

    Args:
        model: A base, or a base with an adapter.
        rows: Columns `input_ids` and `labels`; of packed sequences also `seq_lengths`.
        batch_size: Rows computed at once; fewer where their logits would exceed `LOGITS_BYTES`.
        quantization: As the base was loaded.

    Returns:
        The evaluation, with the rows in their order.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    indices = range(len(rows))
    order = sorted(indices, key=lambda index: -lengths[index])
    losses = [0.0] * len(rows)
    tokens = [0] * len(rows)
    correct = [0] * len(rows)
    with evaluation_mode(model), autocast(quantization):
        batch_size, prefix_length = _choose_batches(model, rows, batch_size)
        prefix_cache = compute_prefix(model, rows, prefix_length)
        vocabulary = text_config_of(base_of(model).config).vocab_size
        start = 0
        while start < len(rows):
            longest = lengths[order[start]] - prefix_length
            stop = start + rows_at_once(longest, vocabulary, batch_size)
            batch_indices = order[start:stop]
            start = stop
            batch = [rows[index] for index in batch_indices]
            predictions = predict(model, batch, prefix_length, prefix_cache)
            row_losses, row_tokens = predictions.sum_by_row(len(batch))
            row_correct = predictions.count_correct(len(batch))
            for position, index in enumerate(batch_indices):
                losses[index] = row_losses[position]
                tokens[index] = row_tokens[position]
                correct[index] = row_correct[position]
    return Evaluation(
        row_losses=tuple(losses),
        row_tokens=tuple(tokens),
        row_correct=tuple(correct),
    )


def join_evaluations(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Return the evaluation of all rows, the first evaluation's first."""
    return Evaluation(
        row_losses=tuple(loss for part in evaluations for loss in part.row_losses),
        row_tokens=tuple(count for part in evaluations for count in part.row_tokens),
        row_correct=tuple(count for part in evaluations for count in part.row_correct),
    )


def rows_at_once(longest: int, vocabulary: int, batch_size: int) -> int:
    """Return how many rows are evaluated at once: fewer than asked for where logits are large.

    Args:
        longest: Tokens of the longest row.
        vocabulary: Columns of the logits.
        batch_size: The most rows.
    """
    row_bytes = 4 * longest * vocabulary  # in float32
    return min(batch_size, max(1, LOGITS_BYTES // row_bytes))


def packed_sequences_hold(
    model: torch.nn.Module, tokens: int, quantization: QuantizationSettings
) -> bool:
    """Return whether the rows of a packed sequence don't see each other.

    Args:
        model: A base, or a base with an adapter.
        tokens: Tokens of the longest sequence.
        quantization: As the base was loaded.
    """
    with evaluation_mode(model), autocast(quantization):
        compare = functools.partial(_compare_packed, model, 1)
        return holds(Shortcut.PACKED_SEQUENCES, model, tokens, compare)


def _choose_batches(
    model: torch.nn.Module, examples: Sequence[dict[str, Any]], batch_size: int
) -> tuple[int, int]:
    """Return how many rows are computed at once, and how long the prefix is that is computed once.

    Args:
        model: In evaluation mode.
        examples: Tokenised rows.
        batch_size: Rows that may be computed at once.
    """
    # A single row takes no shortcut.
    if len(examples) < 2:
        return batch_size, 0
    longest = max(len(row["input_ids"]) for row in examples)
    prefix_length = common_prefix_length(examples)
    if prefix_length:
        compare = functools.partial(_compare_shared_prefix, model)
        # This probe compares a row in a batch, so it covers rows together as well.
        if holds(Shortcut.SHARED_PREFIX, model, longest, compare):
            return batch_size, prefix_length
    if batch_size == 1:
        return 1, 0
    shortcut = Shortcut.ROWS_TOGETHER
    compare = functools.partial(_compare_rows, model)
    if "seq_lengths" in examples[0]:
        shortcut = Shortcut.SEQUENCES_TOGETHER
        compare = functools.partial(_compare_packed, model, 2)
    if not holds(shortcut, model, longest, compare):
        return 1, 0
    return batch_size, 0


def _compare_rows(model: torch.nn.Module, length: int) -> Comparison:
    """Compare a row's logits beside a longer one with those alone."""
    longer = _whole_row(probe_ids(model, length + 3, 1))
    shorter = _whole_row(probe_ids(model, length, 0))
    predictions = predict(model, [longer, shorter])
    # The shorter one is padded. What its last token predicts is not in the row.
    plain = plain_logits(model, shorter["input_ids"])[:-1]
    return predictions.logits_of(1), plain


def _compare_shared_prefix(model: torch.nn.Module, length: int) -> Comparison:
    """Compare a row's logits after a cached prefix, beside a longer one, with those alone."""
    prefix = probe_ids(model, length, 0)
    longer = _whole_row(prefix + probe_ids(model, 5, length + 1))
    shorter = _whole_row(prefix + probe_ids(model, 3, length + 6))
    batch = [longer, shorter]
    cache = compute_prefix(model, batch, length)
    predictions = predict(model, batch, length, cache)
    plain = plain_logits(model, shorter["input_ids"])
    return predictions.logits_of(1), plain[length:-1]


def _compare_packed(model: torch.nn.Module, sequences: int, length: int) -> Comparison:
    """Compare a row's logits after another one in a packed sequence with those alone.

    Args:
        model: In evaluation mode.
        sequences: Sequences at once, 1 or 2: attention functions tell the rows of one by other
            means than those of several.
        length: Tokens of each row.
    """
    neighbour = probe_ids(model, length, 1)
    row = probe_ids(model, length - 1, 0)
    longer_row = probe_ids(model, 2 * length + 1, 2)
    # The packed sequence is the shorter one, so that it is padded.
    batch = [_packed_sequence(longer_row), _packed_sequence(neighbour, row)]
    predictions = predict(model, batch[-sequences:])
    logits = predictions.logits_of(sequences - 1)
    plain = plain_logits(model, row)[:-1]
    # The row is the last one of its sequence.
    return logits[-len(plain) :], plain


def _packed_sequence(*rows: list[int]) -> dict[str, Any]:
    """Return a packed sequence of rows of which every token is predicted."""
    ids = [token for row in rows for token in row]
    lengths = [len(row) for row in rows]
    return _whole_row(ids) | {"seq_lengths": lengths}


def _whole_row(ids: list[int]) -> dict[str, Any]:
    """Return a row of which every token is predicted."""
    return {"input_ids": ids, "labels": ids}
