"""Prompts that are answered together: which, and how many fit into memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.model.architectures import largest_value, text_config_of
from finetune.model.memory import allocatable_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY_SHARE = 0.7
"""Share of the memory that is free now which a batch may take, in [0, 1]."""


@dataclass(frozen=True)
class AnswerBatch:
    """Equally many prompts of each of some runs, so that one product takes all their adapters."""

    runs: list[int]
    rows: list[list[int]]
    """The numbers of each run's prompts; where a run has too few, the last one is repeated."""

    @property
    def size(self) -> int:
        """Prompts of all runs."""
        return sum(map(len, self.rows))

    def members(self) -> list[tuple[int, int]]:
        """Return the run and the number of each prompt."""
        pairs = []
        for run, rows in zip(self.runs, self.rows, strict=True):
            pairs += [(run, row) for row in rows]
        return pairs


def next_batch(pending: dict[int, list[int]], room: int) -> AnswerBatch:
    """Choose the prompts that are answered next.

    A run with less than half as many prompts as another waits for a batch of such runs: it would
    mostly repeat a prompt.

    Args:
        pending: The numbers of each run's prompts that are not answered yet, at least one of each.
        room: How many prompts fit into memory, at least 1.
    """
    longest = max(map(len, pending.values()))
    large = [run for run, rows in pending.items() if 2 * len(rows) >= longest]
    runs = large[:room]
    most_rows = room // len(runs)
    batches = -(-longest // most_rows)
    # All batches about equal, so that the last one is not much smaller.
    row_count = -(-longest // batches)
    batch_rows = []
    for run in runs:
        rows = pending[run][:row_count]
        missing = row_count - len(rows)
        batch_rows.append(rows + rows[-1:] * missing)
    return AnswerBatch(runs, batch_rows)


def remove_answered(pending: dict[int, list[int]], batch: AnswerBatch) -> None:
    """Remove the prompts of a batch from those that are not answered yet."""
    for run, rows in zip(batch.runs, batch.rows, strict=True):
        answered = set(rows)
        remaining = [row for row in pending[run] if row not in answered]
        if remaining:
            pending[run] = remaining
        else:
            del pending[run]


def rows_in_memory(model: "PreTrainedModel", tokens: int) -> int:
    """Return how many prompts can be answered at once, at least 1, by an estimate.

    Args:
        model: A base, or a base with an adapter.
        tokens: Tokens of the longest prompt and answer together.
    """
    config = text_config_of(model.config)
    heads: int = getattr(config, "num_attention_heads", None) or 1
    hidden_size: int = getattr(config, "hidden_size", None) or 1024
    layers: int = getattr(config, "num_hidden_layers", None) or 1
    cached_heads: int = largest_value(config, "num_key_value_heads") or heads
    head_dim: int = largest_value(config, "head_dim") or hidden_size // heads
    keys_and_values = 2 * layers * cached_heads * head_dim
    # What a block computes for the tokens of the prompts: some ten times the hidden state, with
    # norms in float32.
    activations = 20 * hidden_size
    item_bytes = model.get_input_embeddings().weight.element_size()
    token_bytes = item_bytes * (keys_and_values + activations)
    # Logits in float32 with some copies, and the attention mask as booleans and as numbers.
    row_bytes = 32 * config.vocab_size + 4 * tokens**2
    free = MEMORY_SHARE * allocatable_memory()
    return max(1, int(free / (tokens * token_bytes + row_bytes)))
