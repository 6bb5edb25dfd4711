"""The loss on held-out rows: one measure for all engines and commands.

It does not depend on the batch size, draws no random numbers, and leaves the model as it was.
"""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from finetune.config.sections.model import QuantizationSettings
from finetune.data.encoding import IGNORED
from finetune.data.lengths import common_prefix_length
from finetune.data.token_file import Example
from finetune.engine.probes import (
    Comparison,
    Shortcut,
    base_of,
    holds,
    plain_logits,
    probe_ids,
)
from finetune.model.architectures import text_config_of
from finetune.model.quantization import autocast


@dataclass(frozen=True)
class Evaluation:
    """A model's losses on the answer tokens of a set of rows."""

    row_losses: tuple[float, ...]
    """Sum of the negative log-likelihoods of each row's answer tokens, in nats."""
    row_tokens: tuple[int, ...]
    """Number of answer tokens of each row."""
    accuracy: float
    """Share of answer tokens that the model finds most likely, in [0, 1]."""

    @property
    def tokens(self) -> int:
        """Number of answer tokens of all rows."""
        return sum(self.row_tokens)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of an answer token, in nats."""
        return math.fsum(self.row_losses) / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709

    def metrics(self, split: str) -> dict[str, float]:
        """Return loss and accuracy as files and trackers name them, for example `eval/loss`.

        Args:
            split: `eval` or `test`.
        """
        return {f"{split}/loss": self.loss, f"{split}/accuracy": self.accuracy}


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
        batch_size: Rows computed at once.
        quantization: As the base was loaded.

    Returns:
        The evaluation, with the rows in their order.
    """
    examples = rows
    order = sorted(
        range(len(examples)), key=lambda index: -len(examples[index]["input_ids"])
    )
    losses = [0.0] * len(examples)
    tokens = [0] * len(examples)
    correct = 0
    with evaluation_mode(model), autocast(quantization):
        batch_size, prefix_length = _choose_batches(model, examples, batch_size)
        prefix_cache = _compute_prefix(model, examples, prefix_length)
        for start in range(0, len(examples), batch_size):
            indices = order[start : start + batch_size]
            batch = [examples[index] for index in indices]
            predictions = _predict(model, batch, prefix_length, prefix_cache)
            row_losses, row_tokens = predictions.sum_by_row(len(batch))
            for position, index in enumerate(indices):
                losses[index] = row_losses[position]
                tokens[index] = row_tokens[position]
            correct += predictions.count_correct()
    accuracy = correct / max(sum(tokens), 1)
    return Evaluation(tuple(losses), tuple(tokens), accuracy)


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
    if len(examples) < 2:
        return batch_size, 0
    longest = max(len(row["input_ids"]) for row in examples)
    prefix_length = common_prefix_length(examples)
    if prefix_length:
        compare = functools.partial(_compare_shared_prefix, model)
        if holds(Shortcut.SHARED_PREFIX, model, longest, compare):
            return batch_size, prefix_length
    if batch_size == 1:
        return 1, 0
    shortcut = Shortcut.ROWS_TOGETHER
    compare = functools.partial(_compare_rows, model)
    if "seq_lengths" in examples[0]:
        shortcut = Shortcut.SEQUENCES_TOGETHER
        compare = functools.partial(_compare_packed, model, 2)
    return (batch_size if holds(shortcut, model, longest, compare) else 1), 0


def _compare_rows(model: torch.nn.Module, length: int) -> Comparison:
    """Compare a row's logits beside a longer one with those alone."""
    batch = [
        _whole_row(probe_ids(model, length + 3, 1)),
        _whole_row(probe_ids(model, length, 0)),
    ]
    logits = _predict(model, batch, 0, None).logits_of(1)
    return logits, plain_logits(model, batch[1]["input_ids"])[:-1]


def _compare_shared_prefix(model: torch.nn.Module, length: int) -> Comparison:
    """Compare a row's logits after a cached prefix, beside a longer one, with those alone."""
    prefix = probe_ids(model, length, 0)
    longer = _whole_row(prefix + probe_ids(model, 5, length + 1))
    shorter = _whole_row(prefix + probe_ids(model, 3, length + 6))
    batch = [longer, shorter]
    cache = _compute_prefix(model, batch, length)
    logits = _predict(model, batch, length, cache).logits_of(1)
    return logits, plain_logits(model, shorter["input_ids"])[length:-1]


def _compare_packed(model: torch.nn.Module, sequences: int, length: int) -> Comparison:
    """Compare a row's logits after another one in a packed sequence with those alone.

    Args:
        model: In evaluation mode.
        sequences: Sequences at once, 1 or 2: attention functions tell the rows of one by other
            means than those of several.
        length: Tokens of each row.
    """
    neighbour, row = probe_ids(model, length, 1), probe_ids(model, length - 1, 0)
    packed = _whole_row(neighbour + row) | {"seq_lengths": [len(neighbour), len(row)]}
    longer = probe_ids(model, 2 * length + 1, 2)
    batch = [_whole_row(longer) | {"seq_lengths": [len(longer)]}, packed][-sequences:]
    logits = _predict(model, batch, 0, None).logits_of(sequences - 1)
    return logits[1 - len(row) :], plain_logits(model, row)[:-1]


def _whole_row(ids: list[int]) -> dict[str, Any]:
    """Return a row of which every token is predicted."""
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class _Predictions:
    """Predictions of the answer tokens of a batch."""

    logits: torch.Tensor
    """[answer tokens, vocabulary]"""
    targets: torch.Tensor
    """Token ids [answer tokens]."""
    rows: torch.Tensor
    """The number of each token's row in the batch [answer tokens]."""

    def sum_by_row(self, row_count: int) -> tuple[list[float], list[int]]:
        """Return each row's summed loss in nats, and its number of answer tokens."""
        losses = cross_entropy(self.logits.float(), self.targets, reduction="none")
        # In float64 the sum of a row hardly depends on the order of its terms.
        sums = torch.zeros(row_count, dtype=torch.float64, device=losses.device)
        sums.index_add_(0, self.rows, losses.double())
        counts = torch.bincount(self.rows, minlength=row_count)
        return sums.tolist(), counts.tolist()

    def logits_of(self, row: int) -> torch.Tensor:
        """Return the logits of a row's answer tokens [answer tokens, vocabulary]."""
        return self.logits[self.rows == row]

    def count_correct(self) -> int:
        """Count the tokens that the model finds most likely."""
        likeliest = self.logits.argmax(-1)
        return int((likeliest == self.targets).sum())


def _compute_prefix(
    model: torch.nn.Module, examples: Sequence[dict[str, Any]], prefix_length: int
) -> Any:
    """Return the cached keys and values of the first tokens that all rows share.

    Each layer's are [1, heads, tokens, head_dim]. None if no tokens are shared.
    """
    if prefix_length == 0:
        return None
    device = next(model.parameters()).device
    prefix = examples[0]["input_ids"][:prefix_length]
    input_ids = torch.tensor([prefix], device=device)
    limit = {"logits_to_keep": 1} if _limits_logits(model) else {}
    return model(input_ids=input_ids, use_cache=True, **limit).past_key_values


def _limits_logits(model: torch.nn.Module) -> bool:
    """Whether a base computes logits only at the positions that it is asked for."""
    return (
        "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters
    )


def _predict(
    model: torch.nn.Module,
    batch: Sequence[dict[str, Any]],
    prefix_length: int,
    prefix_cache: Any,
) -> _Predictions:
    """Predict the answer tokens of a batch.

    Args:
        model: In evaluation mode.
        batch: Tokenised rows.
        prefix_length: Number of first tokens that all rows share; they are in `prefix_cache`.
        prefix_cache: Keys and values of those tokens; None: there are none.
    """
    device = next(model.parameters()).device
    inputs = _padded_inputs(batch, prefix_length)
    labels = _next_token_labels(batch, prefix_length, inputs.get("position_ids"))
    is_answer = labels != IGNORED
    # Logits are the largest tensor: none of positions before the first answer token of any row.
    first = int(is_answer.any(0).nonzero()[0])
    positions = torch.arange(first, labels.shape[1])
    arguments: dict[str, Any] = {
        name: tensor.to(device) for name, tensor in inputs.items()
    }
    if _limits_logits(model):
        arguments["logits_to_keep"] = positions.to(device)
    arguments["use_cache"] = prefix_cache is not None
    if prefix_cache is not None:
        cache = copy.deepcopy(prefix_cache)  # the forward pass appends to it
        cache.batch_repeat_interleave(len(batch))
        arguments["past_key_values"] = cache
    logits = model(**arguments).logits
    if not _limits_logits(model):
        logits = logits[:, positions]
    is_answer = is_answer[:, positions].to(device)
    labels = labels[:, positions].to(device)
    rows = is_answer.nonzero()[:, 0]
    return _Predictions(logits[is_answer], labels[is_answer], rows)


def _padded_inputs(
    batch: Sequence[dict[str, Any]], prefix_length: int
) -> dict[str, torch.Tensor]:
    """Return a batch's inputs after the shared prefix, padded on the right [rows, tokens]."""
    ids = _pad([row["input_ids"][prefix_length:] for row in batch], 0)
    if "seq_lengths" in batch[0]:
        # Packed sequences: positions restart at each original row, which separates the rows.
        positions = [_restarting_positions(row["seq_lengths"]) for row in batch]
        return {"input_ids": ids, "position_ids": _pad(positions, 0)}
    # The mask covers the cached prefix too.
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    is_token = torch.arange(prefix_length + ids.shape[1]) < lengths
    return {"input_ids": ids, "attention_mask": is_token.long()}


def _next_token_labels(
    batch: Sequence[dict[str, Any]],
    prefix_length: int,
    position_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return the label that each position predicts, IGNORED where none counts [rows, tokens - 1].

    Args:
        batch: Tokenised rows.
        prefix_length: Number of first tokens to leave out.
        position_ids: Of packed sequences [rows, tokens]: an original row's first token is not
            predicted from the row before it.
    """
    labels = _pad([row["labels"][prefix_length:] for row in batch], IGNORED)[:, 1:]
    if position_ids is not None:
        labels = labels.masked_fill(position_ids[:, 1:] == 0, IGNORED)
    return labels


def _restarting_positions(lengths: Sequence[int]) -> list[int]:
    """Return the positions of concatenated rows of these lengths, each from 0."""
    positions: list[int] = []
    for length in lengths:
        positions += range(length)
    return positions


def _pad(sequences: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Pad sequences on the right to the longest [rows, tokens]."""
    longest = max(len(sequence) for sequence in sequences)
    padded = [sequence + [filler] * (longest - len(sequence)) for sequence in sequences]
    return torch.tensor(padded)
