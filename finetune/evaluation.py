"""The loss on held-out rows: one measure for all engines and commands, the same whatever the batch size."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from finetune.base import autocast
from finetune.config import QuantizationSettings
from finetune.tokens import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Evaluation:
    """Sums over the answers' tokens of a set of rows."""

    loss: float
    """Mean negative log-likelihood of a token, in nats."""
    accuracy: float
    """Share of tokens that the model would have chosen itself."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def metrics(self, part: str) -> dict[str, float]:
        """Under the names that files and trackers use, for example `eval/loss`."""
        return {f"{part}/loss": self.loss, f"{part}/accuracy": self.accuracy}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode and no gradients, while the context lasts."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: torch.nn.Module, rows: "Dataset", batch_size: int, quantization: QuantizationSettings
) -> Evaluation:
    """Measure a causal language model on tokenised rows (`input_ids`, `labels`).

    Rows are batched by length, so that little is padding, and only the positions that predict an answer's
    token get logits. The model's mode is left as it was; no random number is drawn.
    """
    loss = torch.zeros((), dtype=torch.float64)
    correct = tokens = 0
    examples: list[dict[str, Any]] = sorted(rows.to_list(), key=lambda row: -len(row["input_ids"]))
    with evaluating(model), autocast(quantization):
        for start in range(0, len(examples), batch_size):
            logits, targets = _answers(model, examples[start : start + batch_size])
            loss += cross_entropy(logits.float(), targets, reduction="sum").double().cpu()
            correct += int((logits.argmax(-1) == targets).sum())
            tokens += targets.numel()
    return Evaluation(loss.item() / max(tokens, 1), correct / max(tokens, 1), tokens)


def _answers(model: torch.nn.Module, batch: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens, vocabulary] and targets [tokens] where the loss counts."""
    device = next(model.parameters()).device
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in batch])

    ids, labels = padded("input_ids", 0), padded("labels", IGNORED)[:, 1:]
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths).long()}
    if "seq_lengths" in batch[0]:  # packed: positions start anew with each row, and mark the boundaries
        positions = [[n for length in row["seq_lengths"] for n in range(length)] for row in batch]
        inputs["position_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in positions])
        del inputs["attention_mask"]
        labels = labels.masked_fill(inputs["position_ids"][:, 1:] == 0, IGNORED)  # no row's first token is predicted
    counted = labels != IGNORED
    first = int(counted.any(0).nonzero()[0])  # no row of the batch has an answer's token before it
    kept = torch.arange(first, longest - 1)
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits = model(**moved, logits_to_keep=kept.to(device), use_cache=False).logits
    counted, labels = counted[:, kept].to(device), labels[:, kept].to(device)
    return logits[counted], labels[counted]
