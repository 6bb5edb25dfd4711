"""Compare a GGUF file with the model folder from which it was written.

transformers loads the file again. What its reader does not read of a file (scaled rotary positions,
biases, windows) is taken from the model folder: see `NOT_READ`.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.compat import gguf_bar_on_terminal_only
from finetune.model.gguf.architectures import rotary_of
from finetune.model.gguf.errors import ExportError
from finetune.model.gguf.vocabulary import adds_bos, file_adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TEXTS = (
    "The quick brown fox jumps over the lazy dog. What does it do next?",
    "def mean(values):\n    return sum(values) / len(values)  # of 12345 numbers, or 3.14\n",
    "Grüße aus Köln! Цена: 1 234,56 €; 日本語のテキスト, I've 'said' \"so\".",
)
"""What is compared: ids of tokens, and predictions on them."""

LIMITS = {
    "float32": 1e-5,
    "float16": 1e-5,
    "bfloat16": 1e-5,
    "q8_0": 0.05,
    "q4_k_m": 0.5,
}
"""Largest accepted divergence from the model folder in nats per token, by the type of the file.

Without quantization the weights are the same; a wrong weight, or a layout that is not llama.cpp's,
differs by several nats.
"""

NOT_READ = (
    "attention_bias",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "mlp_bias",
    "query_pre_attn_scalar",
    "rope_parameters",
    "sliding_window",
)
"""Settings that transformers' reader leaves at their defaults."""


@dataclass(frozen=True)
class Comparison:
    """How the predictions of a GGUF file differ from those of the model folder."""

    divergence: float
    """Mean Kullback-Leibler divergence, in nats per token."""
    largest_difference: float
    """Of a log-probability, in nats."""


def check_gguf(
    folder: Path,
    file: Path,
    file_type: str,
    variables: Mapping[str, Any] | None = None,
) -> Comparison | None:
    """Compare a GGUF file with its model folder.

    Args:
        folder: The model folder.
        file: The file.
        file_type: A key of `LIMITS`.
        variables: Variables of the chat template (`model.template_kwargs`).

    Returns:
        The differences; None: transformers does not read files of this architecture.

    Raises:
        ExportError: The tokens or the predictions differ, by more than the type explains.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (NotImplementedError, ValueError):
        return None
    expected = AutoConfig.from_pretrained(folder)
    _check_tokenizer(folder, file, variables)
    theta, expected_theta = (
        rotary_of(each)["rope_theta"] for each in (config, expected)
    )
    if not math.isclose(theta, expected_theta, rel_tol=1e-6):
        raise _failed(f"its rotary base is {theta}, not {expected_theta}")
    for name in NOT_READ:
        if hasattr(expected, name):
            setattr(config, name, getattr(expected, name))
    comparison = _compare(_predictions(folder), _predictions(folder, file, config))
    limit = LIMITS[file_type]
    # Not "greater": the divergence may be NaN.
    if not comparison.divergence <= limit:
        difference = (
            f"its predictions differ by {comparison.divergence:.1e} nats per token"
        )
        raise _failed(f"{difference}, more than {limit:g} for {file_type}")
    return comparison


def _failed(reason: str) -> ExportError:
    advice = (
        "python -m finetune.merge and llama.cpp's converter write it without this check"
    )
    return ExportError(
        f"the file, loaded again by transformers, is not the model: {reason}; {advice}"
    )


def _check_tokenizer(
    folder: Path, file: Path, variables: Mapping[str, Any] | None
) -> None:
    """Refuse a file whose tokenizer gives other ids, but for a BOS token that chats do not have."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    bos = tokenizer.bos_token_id
    drops_bos = adds_bos(tokenizer) and not file_adds_bos(tokenizer, variables)
    for text in TEXTS:
        ids = [each(text)["input_ids"] for each in (read, tokenizer)]
        if drops_bos:
            # transformers may add the token whatever the file says.
            ids = [each[1:] if each[0] == bos else each for each in ids]
        if ids[0] != ids[1]:
            raise _failed(f"its tokenizer gives other ids to {text!r}")
    if tokenizer.chat_template and read.chat_template != tokenizer.chat_template:
        raise _failed("it has another chat template")


def _predictions(
    folder: Path, file: Path | None = None, config: "PreTrainedConfig | None" = None
) -> list[torch.Tensor]:
    """Return the log-probabilities [tokens, vocabulary] on each text, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if file is not None:
        arguments |= {"gguf_file": file.name, "config": config}
    with gguf_bar_on_terminal_only(), _quiet():
        model = AutoModelForCausalLM.from_pretrained(
            folder if file is None else file.parent, **arguments
        )
    model.eval()
    predictions = []
    with torch.inference_mode():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logits = model(input_ids=ids).logits[0].float()
            predictions.append(logits.log_softmax(-1))
    return predictions


def _compare(expected: list[torch.Tensor], actual: list[torch.Tensor]) -> Comparison:
    one, other = torch.cat(expected), torch.cat(actual)
    divergence = (one.exp() * (one - other)).sum(-1).mean()
    # Rounding of float32 may leave a tiny negative value.
    return Comparison(
        max(float(divergence), 0.0) if divergence == divergence else math.nan,
        float((one - other).abs().max()),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what transformers says of a file's weights: the comparison judges them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
