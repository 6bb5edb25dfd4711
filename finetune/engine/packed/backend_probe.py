"""Whether a backend computes for a base what the base's own code computes.

A base may differ from what its `model_type` says. So a new bank compares the logits of a few tokens
(see `finetune.engine.probes`), once for each base.
"""

import functools
from typing import TYPE_CHECKING

import torch

from finetune.config.sections.model import QuantizationSettings
from finetune.data.encoding import IGNORED
from finetune.data.lengths import MIN_SHARED_TOKENS
from finetune.engine.evaluation import evaluation_mode
from finetune.engine.packed.autograd_backend import AutogradBackend
from finetune.engine.packed.backend import Backend
from finetune.engine.packed.batch import BatchDevices, Row, pack_rows
from finetune.engine.packed.pipeline import complete_pass
from finetune.engine.packed.row_by_row import recurrent_layers
from finetune.engine.packed.slot import Slot
from finetune.engine.probes import (
    Comparison,
    Shortcut,
    failure,
    plain_logits,
    probe_ids,
)
from finetune.model.architectures import logit_transform_of
from finetune.model.quantization import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def backend_failure(
    shortcut: Shortcut,
    backend: Backend,
    autograd: AutogradBackend,
    base: "PreTrainedModel",
    slot: Slot,
    devices: BatchDevices,
    quantization: QuantizationSettings,
) -> str | None:
    """Return why a backend does not compute the logits that the base's own code computes.

    Args:
        shortcut: `GPU_DECODER` or `PACKED_BATCH`.
        backend: The backend to be probed.
        autograd: Applies the slot's adapter to the base's own code.
        base: The base.
        slot: Any slot that is attached to both backends.
        devices: Where a pass of the slot reads its batch.
        quantization: As the base was loaded.

    Returns:
        See `finetune.engine.probes.failure`; None: it computes them.
    """
    compare = functools.partial(
        _compare_backend, backend, autograd, base, slot, devices
    )
    # Each GPU has its own copies of the others' blocks.
    variant = f"borrowed blocks on {slot.device}" if slot.is_on_one_device else ""
    with evaluation_mode(base), torch.no_grad(), autocast(quantization):
        return failure(shortcut, base, 0, compare, variant)


def _compare_backend(
    backend: Backend,
    autograd: AutogradBackend,
    base: "PreTrainedModel",
    slot: Slot,
    devices: BatchDevices,
    length: int,
) -> Comparison:
    """Compare a row's logits in a packed batch with those of the base's own code.

    The row follows another one, with which it shares a prefix that is computed once, unless the
    base has recurrent layers.
    """
    prefix = probe_ids(base, MIN_SHARED_TOKENS, 0)
    rows = []
    for first in (MIN_SHARED_TOKENS, MIN_SHARED_TOKENS + length):
        answer = probe_ids(base, length // 2, first)
        rows.append(_probe_row(prefix, answer))
    group_size = 1 if recurrent_layers(base) else None
    batch = pack_rows([rows], devices, [group_size])
    slot.refresh_weights()
    # As in training, where the backends round to 16 bits themselves.
    with torch.autocast("cuda", enabled=False):
        hidden, _ = complete_pass(backend.forward(batch, [slot], None))
        row_hidden = hidden[batch.target_rows.to(hidden.device) == 1]
        outputs = base.get_output_embeddings()(row_hidden)
        logits = logit_transform_of(base.config).apply(outputs)
    with autograd.adapted_rows([slot]) as adapted_base:
        plain = plain_logits(adapted_base, rows[1]["input_ids"])
    return logits, plain[len(prefix) : -1]


def _probe_row(prefix: list[int], answer: list[int]) -> Row:
    """Return a row whose answer is predicted, but for its first token."""
    # A shared prefix ends before the token that predicts the first label: without a label on the
    # answer's first token, all of the prefix is shared.
    ids = prefix + answer
    ignored = len(prefix) + 1
    return {"input_ids": ids, "labels": [IGNORED] * ignored + ids[ignored:]}
