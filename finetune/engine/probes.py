"""Shortcuts, and the probes that show for a base whether they hold.

A shortcut computes the same as a plain way, faster: rows together in a batch, a shared prefix once,
generation with cached keys and values. It rests on the base's own code, which may be wrong about
padding, positions or its cache. So each shortcut is compared once with the plain way on the loaded
base, with a few tokens. `holds` is the one place that decides.
"""

import logging
import traceback
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from finetune.compat import attention_implementation_of
from finetune.console import summary_line
from finetune.engine.check_record import record_file
from finetune.errors import Interrupted, is_out_of_memory_error
from finetune.files.atomic import write_json
from finetune.model.architectures import (
    WINDOWS,
    largest_value,
    scaled_positions,
    text_config_of,
)
from finetune.model.layer_devices import count_stages

log = logging.getLogger(__name__)

Comparison = tuple[torch.Tensor, torch.Tensor]
"""Logits of the same tokens [tokens, vocabulary], by the shortcut and by the plain way."""

EXACT_TOLERANCE = 1e-4
"""Largest difference in float32, as a share of a token's logits."""

ROUNDED_TOLERANCE = 0.1
"""The same in 16 or 8 bits, for the median token. Rows that see each other differ by more."""

DECODER_TOLERANCE = 0.2
"""The same for the GPU's decoder, whose products are rounded in another order.

Measured: through the 32 blocks of a base of Llama-2-7B's shapes with random weights, in NF4 and
bfloat16 on an H200, right logits differ by 5.6 %. Deeper bases differ by more. The decoder's
architectures are tested one by one; the probe is for a base that is not what its type says.
"""

PROBE_VERSION = 6
"""Increased when a shortcut or its probe changes, so that earlier records are not used."""


class Shortcut(Enum):
    """Each value is the log line for a base on which the shortcut does not hold."""

    ROWS_TOGETHER = (
        "evaluating one row after another, which is slower: beside a row of another length, a row "
        "has other logits"
    )
    SEQUENCES_TOGETHER = (
        "evaluating one packed sequence after another, which is slower: beside another sequence, a "
        "row has other logits"
    )
    SHARED_PREFIX = (
        "evaluating each row whole, which is slower: after a cached beginning, a row has other "
        "logits"
    )
    PROMPTS_TOGETHER = (
        "answering one prompt after another, which is slower: padded on the left beside a longer "
        "one, a prompt has other logits"
    )
    RECORDED_STEPS = (
        "generating tokens without recorded steps, which is slower: as one launch, the kernels of "
        "a step compute other logits"
    )
    CACHED_STEPS = (
        "answering without a cache, which is slower: with cached keys and values, a token has "
        "other logits"
    )
    GPU_DECODER = (
        "training with PyTorch's slower operations: the GPU kernels compute other logits than the "
        "base's own code"
    )
    PACKED_BATCH = "the packed engine computes other logits than the base's own code"
    PACKED_SEQUENCES = "the rows of a sequence would see each other"


# Weak, so that the answers of a base end with the base.
_answers: WeakKeyDictionary[
    torch.nn.Module, dict[tuple[Shortcut, int, str], str | None]
] = WeakKeyDictionary()
"""Of each loaded base, by shortcut, length of its probe and variant: why it fails; None: it
holds."""


def holds(
    shortcut: Shortcut,
    model: torch.nn.Module,
    tokens: int,
    compare: Callable[[int], Comparison],
) -> bool:
    """Return whether `failure` finds none."""
    return failure(shortcut, model, tokens, compare) is None


def failure(
    shortcut: Shortcut,
    model: torch.nn.Module,
    tokens: int,
    compare: Callable[[int], Comparison],
    variant: str = "",
) -> str | None:
    """Return why a shortcut does not compute what the plain way computes, probed once for a base.

    The answer is kept with the loaded base. That a shortcut holds is recorded in the cache folder
    too; that it does not is logged once in each process.

    Args:
        shortcut: What is probed.
        model: The base, or the base with an adapter; in evaluation mode, without gradients.
        tokens: Tokens of the longest row that the shortcut will compute.
        compare: Computes the logits of a row in both ways. Its argument is the length of the
            probe. Any error but a lack of memory means that the shortcut does not hold.
        variant: Tells apart several ways of the same shortcut.

    Returns:
        The difference of the logits or the error; None: the shortcut holds.
    """
    base = base_of(model)
    length = _probe_length(base, tokens)
    answers = _answers.setdefault(base, {})
    key = (shortcut, length, variant)
    if key in answers:
        return answers[key]
    # A probe of an earlier process holds here too: the record's name covers all that it depends on.
    record = _record(shortcut, base, length, variant)
    if record is not None and record.exists():
        answers[key] = None
        return None
    try:
        computed, plain = compare(length)
        # A diverged adapter shows nothing about the base, so this answer is not kept.
        if not plain.isfinite().all():
            return "its logits are not finite"
        tolerance = _tolerance(shortcut, model)
        # Of a base that is spread over GPUs, one may be where the rows are, one where the head is.
        computed = computed.to(plain.device)
        reason = _difference(computed.float(), plain.float(), tolerance)
    except Exception as error:
        # Neither says anything about the base.
        if isinstance(error, Interrupted) or is_out_of_memory_error(error):
            raise
        # The frames hold the tensors of the pass.
        traceback.clear_frames(error.__traceback__)
        reason = f"{type(error).__name__}: {summary_line(error)}"
    answers[key] = reason
    if reason is not None:
        log.info(
            "%s (%s: %s)",
            shortcut.value,
            model_type_of(base),
            reason,
        )
    elif record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        content = {"shortcut": shortcut.name, "model_type": model_type_of(base)}
        write_json(record, content)
    return reason


def base_of(model: Any) -> Any:
    """Return the base of a model with an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_type_of(base: Any) -> str:
    """Return the name of a base's architecture."""
    config = getattr(base, "config", None)
    return str(getattr(config, "model_type", type(base).__name__))


def probe_ids(model: Any, length: int, first: int) -> list[int]:
    """Return ids for a probe: all differ, as far as the vocabulary allows it.

    They are in the middle of the vocabulary: special tokens stand at its ends.
    """
    vocabulary = text_config_of(base_of(model).config).vocab_size
    half = vocabulary // 2
    # A vocabulary of one token has no half.
    range_size = max(half, 1)
    ids = []
    for index in range(first, first + length):
        offset = 7 * index % range_size
        ids.append(half // 2 + offset)
    return ids


def plain_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Return the logits of a row alone: no padding, no mask, no cache [tokens, vocabulary]."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    logits: torch.Tensor = output.logits[0]
    return logits


def computes_exactly(model: torch.nn.Module) -> bool:
    """Whether products are in float32: no weight has fewer bits, and there is no autocast."""
    device = next(model.parameters()).device
    if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return False
    return all(weight.dtype == torch.float32 for weight in model.parameters())


def _probe_length(base: Any, tokens: int) -> int:
    """Return how many tokens a probe's row needs, to meet what the longest row meets.

    A few, unless the rows are longer than a sliding window, or than the positions after which a
    rotary embedding scales its frequencies.
    """
    length = 6
    config = text_config_of(base.config)
    for name in WINDOWS:
        limit = largest_value(config, name)
        if isinstance(limit, int) and length < limit < tokens:
            # The last tokens don't see the first ones.
            length = limit + 4
    limit = scaled_positions(base.config)
    if limit is not None and length < limit < tokens:
        # The longer row beside it exceeds the limit: frequencies that follow the longest row of a
        # batch would change this one.
        length = limit - 1
    return length


def _record(shortcut: Shortcut, base: Any, length: int, variant: str) -> Path | None:
    """Return the file that says that a shortcut holds for a base, with these versions and here.

    None for remote code: the base's config does not say what it computes.
    """
    if not type(base).__module__.startswith("transformers."):
        return None
    embedding = base.get_input_embeddings().weight
    device = embedding.device
    on_gpu = device.type == "cuda"
    # Tells apart the weights of bases with the same config, without reading all of them.
    rows = embedding[probe_ids(base, length, 0)]
    weights_sum = rows.double().sum().item()
    identity = [
        PROBE_VERSION,
        shortcut.name,
        length,
        type(base).__name__,
        base.config.to_json_string(use_diff=False),
        attention_implementation_of(base.config),
        torch.cuda.get_device_name(device) if on_gpu else "cpu",
        sorted({str(weight.dtype) for weight in base.parameters()}),
        count_stages(base),
        weights_sum,
        *([variant] if variant else []),
    ]
    return record_file("shortcuts", identity)


def _tolerance(shortcut: Shortcut, model: torch.nn.Module) -> float:
    """Return the share of a token's logits by which a right shortcut may differ."""
    if computes_exactly(model):
        return EXACT_TOLERANCE
    return DECODER_TOLERANCE if shortcut is Shortcut.GPU_DECODER else ROUNDED_TOLERANCE


def _difference(
    computed: torch.Tensor, plain: torch.Tensor, tolerance: float
) -> str | None:
    """Return how much two logits of the same tokens differ; None if it is rounding."""
    if computed.shape != plain.shape:
        return f"{tuple(computed.shape)} logits instead of {tuple(plain.shape)}"
    shares = _differing_shares(computed, plain)
    # With rounding, a token that goes to another expert differs much: the median.
    share = shares.max() if tolerance == EXACT_TOLERANCE else shares.median()
    return None if share <= tolerance else f"they differ by {float(share):.2%}"


def _differing_shares(computed: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    """Return each token's difference as a share of its logits [tokens]; NaN counts as infinite."""
    differences = (computed - plain).norm(dim=-1)
    shares: torch.Tensor = differences / plain.norm(dim=-1)
    return shares.nan_to_num(nan=torch.inf)
