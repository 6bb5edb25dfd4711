"""The devices of a base: its layers may be on several GPUs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.engine.packed.batch import BatchDevices
from finetune.engine.packed.slot import Slot
from finetune.model.layer_devices import block_devices, count_stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class BaseDevices:
    """Which device has what of a base."""

    embedding: torch.device
    last_block: torch.device
    head: torch.device
    stages: int
    """GPUs that compute one after the other."""
    block_gpus: tuple[torch.device, ...]
    """The GPUs of the blocks, in the blocks' order; empty where all is on one device."""

    @classmethod
    def of_base(cls, base: "PreTrainedModel") -> "BaseDevices":
        """Read them from the weights of a base."""
        embedding = base.get_input_embeddings().weight.device
        last_block = embedding
        block_gpus: list[torch.device] = []
        stages = count_stages(base)
        if stages > 1:
            devices = block_devices(base.get_decoder())
            last_block = devices[-1]
            block_gpus = list(dict.fromkeys(devices))
        return cls(
            embedding=embedding,
            last_block=last_block,
            head=base.get_output_embeddings().weight.device,
            stages=stages,
            block_gpus=tuple(block_gpus),
        )

    def of_batch(self, slot: Slot) -> BatchDevices:
        """Return where a pass of a slot reads the tensors of its batch."""
        first = last = slot.device
        if not slot.is_on_one_device:
            first, last = self.embedding, self.last_block
        return BatchDevices(self.embedding, first, last, self.head)
