"""The loss on held-out rows: one measure for all engines and commands, the same whatever the batch size."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig

from finetune.config.schema import QuantizationSettings
from finetune.data.encoding import IGNORED
from finetune.data.lengths import common_prefix_length
from finetune.data.tokens import as_list
from finetune.model.architectures import text_config_of
from finetune.model.quantization import autocast

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of the answers' tokens of a set of rows."""

    row_losses: tuple[float, ...]
    """Of each row in its order: the sum of its tokens' negative log-likelihoods, in nats."""
    row_tokens: tuple[int, ...]
    accuracy: float
    """Share of tokens that the model would have chosen itself."""

    @property
    def tokens(self) -> int:
        """All that were counted."""
        return sum(self.row_tokens)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return math.fsum(self.row_losses) / max(self.tokens, 1)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def metrics(self, part: str) -> dict[str, float]:
        """Under the names that files and trackers use, for example `eval/loss`."""
        return {f"{part}/loss": self.loss, f"{part}/accuracy": self.accuracy}


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode and no gradients, while the context lasts.

    A mixture of experts gives no router logits meanwhile: TRL turns them on for its auxiliary loss, which transformers
    can't compute where keys and values are remembered.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    text_config = text_config_of(config) if isinstance(config, PreTrainedConfig) else None
    router_logits = getattr(text_config, "output_router_logits", None)
    model.eval()
    try:
        if text_config is not None and router_logits:
            text_config.output_router_logits = False
        with torch.inference_mode():
            yield
    finally:
        if text_config is not None and router_logits:
            text_config.output_router_logits = router_logits
        for module, training in modes:
            module.training = training


def evaluate(
    model: torch.nn.Module, rows: "Dataset", batch_size: int, quantization: QuantizationSettings
) -> Evaluation:
    """Measure a causal language model on tokenised rows (`input_ids`, `labels`).

    Rows are batched by length, so that little is padding; what they all begin with (a system prompt) is computed
    once; only the positions that predict an answer's token get logits. The model's mode is left as it was; no
    random number is drawn.
    """
    examples = as_list(rows)
    shared = common_prefix_length(examples)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    losses, tokens, correct = [0.0] * len(examples), [0] * len(examples), 0
    with evaluating(model), autocast(quantization):
        beginning = _remember(model, examples[0]["input_ids"][:shared]) if shared else None
        for start in range(0, len(examples), batch_size):
            batch = order[start : start + batch_size]
            logits, targets, owners = _answers(model, [examples[index] for index in batch], shared, beginning)
            each = cross_entropy(logits.float(), targets, reduction="none").double()
            sums = torch.zeros(len(batch), dtype=torch.float64, device=each.device).index_add(0, owners, each)
            counts = torch.bincount(owners, minlength=len(batch))
            for index, loss, count in zip(batch, sums.tolist(), counts.tolist(), strict=True):
                losses[index], tokens[index] = loss, count
            correct += int((logits.argmax(-1) == targets).sum())
    return Evaluation(tuple(losses), tuple(tokens), correct / max(sum(tokens), 1))


def _remember(model: torch.nn.Module, ids: list[int]) -> Any:
    """The keys and values [1, heads, tokens, width] of a text, by layer."""
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1).past_key_values


def _answers(
    model: torch.nn.Module, batch: Sequence[dict[str, Any]], shared: int, beginning: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [tokens, vocabulary], targets [tokens] and rows [tokens] where the loss counts.

    So many first tokens are shared by the rows; what the model remembers of them is given.
    """
    device = next(model.parameters()).device
    longest = max(len(row["input_ids"]) for row in batch) - shared

    def padded(key: str, filler: int) -> torch.Tensor:
        rests = [row[key][shared:] for row in batch]
        return torch.tensor([rest + [filler] * (longest - len(rest)) for rest in rests])

    ids, labels = padded("input_ids", 0), padded("labels", IGNORED)[:, 1:]
    lengths = torch.tensor([[len(row["input_ids"])] for row in batch])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(shared + longest) < lengths).long()}
    if "seq_lengths" in batch[0]:  # packed: positions start anew with each row, and mark the boundaries
        positions = [[n for length in row["seq_lengths"] for n in range(length)] for row in batch]
        inputs["position_ids"] = torch.tensor([row + [0] * (longest - len(row)) for row in positions])
        del inputs["attention_mask"]
        labels = labels.masked_fill(inputs["position_ids"][:, 1:] == 0, IGNORED)  # no row's first token is predicted
    counted = labels != IGNORED
    first = int(counted.any(0).nonzero()[0])  # no row of the batch has an answer's token before it
    kept = torch.arange(first, longest - 1)
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in inputs.items()}
    if beginning is not None:
        moved["past_key_values"] = copy.deepcopy(beginning)
        moved["past_key_values"].batch_repeat_interleave(len(batch))
    logits = model(**moved, logits_to_keep=kept.to(device), use_cache=beginning is not None).logits
    counted, labels = counted[:, kept].to(device), labels[:, kept].to(device)
    return logits[counted], labels[counted], counted.nonzero()[:, 0]
