"""The slots of a bank: how one is created, and which GPU computes for it."""

from collections import Counter
from typing import TYPE_CHECKING

import torch

from finetune.config.sections.lora import LoraSettings
from finetune.engine.packed.backends import Backends
from finetune.engine.packed.base_devices import BaseDevices
from finetune.engine.packed.fresh_adapters import FreshAdapters
from finetune.engine.packed.slot import Slot, SlotBank

if TYPE_CHECKING:
    from peft import PeftModel


class BankSlots:
    """Creates the slots of a bank, and counts those of each GPU."""

    def __init__(
        self,
        bank: SlotBank,
        adapters: FreshAdapters,
        backends: Backends,
        devices: BaseDevices,
    ) -> None:
        """Create no slot yet.

        Args:
            bank: The bank that the slots are on.
            adapters: Creates their adapters.
            backends: Those of the bank's base.
            devices: Those of the bank's base.
        """
        self._bank = bank
        self._adapters = adapters
        self._backends = backends
        self._counts: Counter[torch.device] = Counter(
            dict.fromkeys(devices.block_gpus, 0)
        )
        """Slots on each GPU, where each computes all blocks for its own."""
        self._probes_other_gpus = True
        """Whether all are probed before there is a slot on one."""

    def create(
        self,
        lora: LoraSettings,
        seed: int,
        model: "PeftModel | None" = None,
    ) -> Slot:
        """Create a slot for a run.

        Args:
            lora: The adapter's settings.
            seed: The run's seed.
            model: The adapter from `FreshAdapters.create`; None: it is initialised now.

        Raises:
            ConfigError: A packed batch does not compute what the base's own code computes, or the
                backend can't train the adapter.
        """
        if model is None:
            model = self._adapters.create(lora, seed)
        if self._borrows_blocks() and self._probes_other_gpus:
            # While no slot depends on how the base is computed.
            for device in self._counts:
                if self._borrows_blocks():
                    self._probed_slot(lora, seed, model, device)
            self._probes_other_gpus = False
        slot = self._probed_slot(lora, seed, model, self._emptiest_gpu())
        if slot.is_on_one_device and not self._borrows_blocks():
            slot = self._probed_slot(lora, seed, model, None)
        self._counts[slot.device] += 1
        return slot

    def remove(self, slot: Slot) -> None:
        """Leave a slot's place, and the modules of its adapter, to the next one.

        Nobody may use the slot any more.
        """
        self._counts[slot.device] -= 1
        slot.release_weights()
        self._adapters.take_back(slot.model)

    def _borrows_blocks(self) -> bool:
        """Whether each GPU computes all blocks for slots of its own; ends with a failed probe."""
        return self._backends.current.borrows_blocks

    def _emptiest_gpu(self) -> torch.device | None:
        """The GPU that is to compute all blocks for the next slot; None: none does."""
        if not self._borrows_blocks():
            return None
        return min(self._counts, key=lambda device: self._counts[device])

    def _probed_slot(
        self,
        lora: LoraSettings,
        seed: int,
        model: "PeftModel",
        device: torch.device | None,
    ) -> Slot:
        """Create a slot that the backends know, and probe the backend by it.

        Raises:
            ConfigError: See `create`.
        """
        slot = Slot(self._bank, lora, seed, model, device)
        self._backends.attach(slot)
        self._backends.check(slot)
        return slot
