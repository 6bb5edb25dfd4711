"""Predictions of the answer tokens of a batch, by a causal language model as transformers has it.

Rows are padded on the right. A prefix that they share may be in a cache, computed before.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from finetune.data.encoding import IGNORED
from finetune.engine.probes import base_of

SCORED_TOKENS = 512
"""Tokens whose probabilities are in memory at once."""


@dataclass(frozen=True)
class Predictions:
    """The logits of a batch's answer tokens, and what they should predict."""

    logits: torch.Tensor
    """[answer tokens, vocabulary]"""
    targets: torch.Tensor
    """Token ids [answer tokens]."""
    rows: torch.Tensor
    """The number of each token's row in the batch [answer tokens]."""

    def sum_by_row(self, row_count: int) -> tuple[list[float], list[int]]:
        """Return each row's summed loss in nats, and its number of answer tokens."""
        # In chunks, because logits dominate memory.
        chunks = zip(
            torch.split(self.logits, SCORED_TOKENS),
            torch.split(self.targets, SCORED_TOKENS),
            strict=True,
        )
        # In 16 bits the sum over the vocabulary would be rounded too much.
        losses = torch.cat(
            [
                cross_entropy(logits.float(), targets, reduction="none")
                for logits, targets in chunks
            ]
        )
        # In float64 the sum of a row hardly depends on the order of its terms.
        sums = torch.zeros(row_count, dtype=torch.float64, device=losses.device)
        sums.index_add_(0, self.rows, losses.double())
        counts = torch.bincount(self.rows, minlength=row_count)
        return sums.tolist(), counts.tolist()

    def logits_of(self, row: int) -> torch.Tensor:
        """Return the logits of a row's answer tokens [answer tokens, vocabulary]."""
        return self.logits[self.rows == row]

    def count_correct(self, row_count: int) -> list[int]:
        """Count each row's answer tokens that the model finds most likely."""
        is_correct = self.logits.argmax(-1) == self.targets
        counts = torch.bincount(self.rows[is_correct], minlength=row_count)
        result: list[int] = counts.tolist()
        return result


def compute_prefix(
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
    # Only the keys and values are used: the fewest logits are those of one position.
    limit = {"logits_to_keep": 1} if _limits_logits(model) else {}
    output = model(input_ids=input_ids, use_cache=True, **limit)
    return output.past_key_values


def _limits_logits(model: torch.nn.Module) -> bool:
    """Whether a base computes logits only at the positions that it is asked for."""
    # Of the class: TRL replaces the `forward` of an instance.
    base_class = type(base_of(model))
    signature = inspect.signature(base_class.forward)
    return "logits_to_keep" in signature.parameters


def predict(
    model: torch.nn.Module,
    batch: Sequence[dict[str, Any]],
    prefix_length: int = 0,
    prefix_cache: Any = None,
) -> Predictions:
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
    answer_positions = is_answer.any(0).nonzero()
    first = int(answer_positions[0])
    positions = torch.arange(first, labels.shape[1])
    arguments: dict[str, Any] = {}
    for name, tensor in inputs.items():
        arguments[name] = tensor.to(device)
    if _limits_logits(model):
        arguments["logits_to_keep"] = positions.to(device)
    arguments["use_cache"] = prefix_cache is not None
    if prefix_cache is not None:
        # The forward pass appends to it.
        cache = copy.deepcopy(prefix_cache)
        cache.batch_repeat_interleave(len(batch))
        arguments["past_key_values"] = cache
    logits = model(**arguments).logits
    # Such a base has computed those of all positions.
    if not _limits_logits(model):
        logits = logits[:, positions]
    is_answer = is_answer[:, positions].to(device)
    labels = labels[:, positions].to(device)
    rows = is_answer.nonzero()[:, 0]
    # Of all tokens they are a view: a copy would be as large as the logits.
    answers = logits.flatten(0, 1) if is_answer.all() else logits[is_answer]
    return Predictions(
        logits=answers,
        targets=labels[is_answer],
        rows=rows,
    )


def _padded_inputs(
    batch: Sequence[dict[str, Any]], prefix_length: int
) -> dict[str, torch.Tensor]:
    """Return a batch's inputs after the shared prefix, padded on the right [rows, tokens]."""
    # Any id does for padding: it is behind a row's tokens, which see only what is before them.
    rows = [row["input_ids"][prefix_length:] for row in batch]
    ids = _pad(rows, 0)
    if "seq_lengths" in batch[0]:
        # Packed sequences: positions restart at each original row, which separates the rows.
        positions = [_restarting_positions(row["seq_lengths"]) for row in batch]
        return {"input_ids": ids, "position_ids": _pad(positions, 0)}
    # The mask covers the cached prefix too.
    row_lengths = [len(row["input_ids"]) for row in batch]
    lengths = torch.tensor(row_lengths)
    columns = torch.arange(prefix_length + ids.shape[1])
    is_token = columns < lengths[:, None]
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
    # Position i predicts token i + 1, so the first label is dropped.
    row_labels = [row["labels"][prefix_length:] for row in batch]
    labels = _pad(row_labels, IGNORED)
    next_labels = labels[:, 1:]
    if position_ids is not None:
        is_first = position_ids[:, 1:] == 0
        next_labels = next_labels.masked_fill(is_first, IGNORED)
    return next_labels


def _restarting_positions(lengths: Sequence[int]) -> list[int]:
    """Return the positions of concatenated rows of these lengths, each from 0."""
    positions: list[int] = []
    for length in lengths:
        positions += range(length)
    return positions


def _pad(sequences: Sequence[list[int]], filler: int) -> torch.Tensor:
    """Pad sequences on the right to the longest [rows, tokens]."""
    longest = max(len(sequence) for sequence in sequences)
    padded = []
    for sequence in sequences:
        padding = [filler] * (longest - len(sequence))
        padded.append(sequence + padding)
    return torch.tensor(padded)
