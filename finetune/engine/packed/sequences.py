"""Sequences of several rows (`dataset.packing`) as rows, which a packed batch keeps apart."""

from collections.abc import Sequence

from finetune.data.token_file import Example
from finetune.engine.evaluation import Evaluation
from finetune.engine.packed.batch import Row


def rows_of(examples: Sequence[Example]) -> list[Row]:
    """Return the rows that examples are made of; a row that is no sequence stays as it is."""
    rows: list[Row] = []
    for example in examples:
        if "seq_lengths" not in example:
            rows.append(example)
            continue
        start = 0
        for length in example["seq_lengths"]:
            tokens = slice(start, start + length)
            rows.append(
                {name: example[name][tokens] for name in ("input_ids", "labels")}
            )
            start += length
    return rows


def evaluation_of_sequences(
    rows: Evaluation, examples: Sequence[Example]
) -> Evaluation:
    """Return the evaluation of sequences from that of all their rows (`rows_of`)."""
    losses = []
    tokens = []
    correct = []
    first = 0
    for example in examples:
        members = slice(first, first + len(example["seq_lengths"]))
        losses.append(sum(rows.row_losses[members]))
        tokens.append(sum(rows.row_tokens[members]))
        correct.append(sum(rows.row_correct[members]))
        first = members.stop
    return Evaluation(
        row_losses=tuple(losses),
        row_tokens=tuple(tokens),
        row_correct=tuple(correct),
    )
