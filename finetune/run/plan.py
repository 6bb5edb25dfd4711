"""The plan of a run: its memory by purpose, and how many slots fit. `memory_plan` computes it."""

import functools
import math
import statistics
from dataclasses import dataclass

from finetune.config.schema import RunConfig
from finetune.engine.packed.pipeline import GROUPS_PER_GPU, group_size
from finetune.errors import ConfigError
from finetune.model.device import on_gpu
from finetune.model.memory import GIB, USABLE
from finetune.run.device_memory import DeviceMemory

BUSY_TOKENS = 10_000
"""Tokens in one pass that keep a GPU busy: more slots bring next to nothing
(docs/benchmarks.md)."""

PASS_TOKENS = 250
"""Tokens that a GPU computes in the time that a pass takes besides its tokens. This and the next
two are measured on 7B shapes (docs/benchmarks.md)."""

RECOMPUTATION = 0.38
"""How much longer a token takes where all blocks are computed again."""

DEQUANTIZATION_TOKENS = 300
"""Tokens that a GPU computes in the time in which all blocks are dequantised once more: where one
slot computes them again. Several slots keep the weights meanwhile."""

CLEAR_GAIN = 0.05
"""Share of the time that fewer slots must save, as the three figures differ among bases."""

MOST_SLOTS = 16
"""Limit of `slots=auto`."""


@dataclass(frozen=True)
class Plan:
    """Memory in bytes by what it is for, and work in tokens."""

    devices: tuple[DeviceMemory, ...]
    """Of each GPU that the base is spread over; the host's where there is none."""
    available: int
    """The memory there is: the GPU's, of several the one's that has least, else the host's."""
    batches: tuple[int, ...]
    """Tokens in each of one slot's batches; a prefix that the rows share is counted once."""
    train_tokens: int
    """Tokens of the whole run without padding."""
    weights: int
    """Weights that each token is multiplied by."""
    answers_together: bool = True
    """Whether prompts are answered together, as each alone; else one after another."""
    borrowing: tuple[DeviceMemory, ...] = ()
    """Of each GPU where each computes all blocks for slots of its own; none: it can't be."""

    def borrows_blocks(self, slots: int) -> bool:
        """Decide how several GPUs share a base.

        Args:
            slots: Of a worker.

        Returns:
            Whether each GPU computes all blocks for its own slots, with weights that it borrows
            from the others (`gpu.borrowed_blocks`): where each has a slot and memory allows it.
            Else each GPU computes the blocks that it has, for groups of slots in turn (`pipeline`).
        """
        if not self.borrowing or slots < self.gpus:
            return False
        return self._need(slots, True) <= USABLE * self.available

    @property
    def gpus(self) -> int:
        """Over which the base is spread; 1 on a CPU too."""
        return len(self.devices)

    @property
    def fullest(self) -> DeviceMemory:
        """The device that needs most for one slot."""
        return max(
            self.devices,
            key=lambda device: self._peak_of(device, 1, limit=0, borrows=False),
        )

    def tokens(self, slots: int) -> float:
        """Return the tokens in the largest pass of several slots.

        Batches are drawn independently, so the largest ones hardly ever meet: by extreme value
        theory the maximum of n sums is about their mean plus sqrt(2 ln n) standard deviations.
        """
        mean, deviation = self._mean_and_deviation
        largest = self._largest_batch
        deviations = math.sqrt(2 * math.log(len(self.batches)) * slots)
        expected = slots * mean + deviation * deviations
        return max(largest, min(slots * largest, expected))

    @functools.cached_property
    def _largest_batch(self) -> int:
        return max(self.batches)

    @functools.cached_property
    def _mean_and_deviation(self) -> tuple[float, float]:
        """Of the batches' tokens; of thousands of batches they take milliseconds."""
        return statistics.fmean(self.batches), statistics.pstdev(self.batches)

    def peak(self, slots: int = 1) -> int:
        """Return the most bytes at once while so many slots train or evaluate.

        With partial checkpointing on a GPU, blocks keep their activations as memory allows.
        """
        limit = USABLE * self.available
        borrows = self.borrows_blocks(slots)
        devices = self.borrowing if borrows else self.devices
        return max(self._peak_of(device, slots, limit, borrows) for device in devices)

    def need(self, slots: int = 1) -> int:
        """Return the bytes without which so many slots can't train or evaluate."""
        return self._need(slots, self.borrows_blocks(slots))

    def _need(self, slots: int, borrows: bool) -> int:
        devices = self.borrowing if borrows else self.devices
        return max(self._peak_of(device, slots, 0, borrows) for device in devices)

    def _peak_of(
        self, device: DeviceMemory, slots: int, limit: float, borrows: bool
    ) -> int:
        group = group_size(slots, self.gpus)
        if borrows:
            # Those of one GPU.
            slots = group = math.ceil(slots / self.gpus)
        tokens, group_tokens = self.tokens(slots), self.tokens(group)
        mean, _ = self._mean_and_deviation
        typical = min(1.0, slots * mean / tokens)
        # A pass of fewer tokens may take more: it is recorded, or has room for one block more.
        shares = [typical + (1 - typical) * step / 8 for step in range(9)]
        return max(
            device.peak(slots, group, share * tokens, share * group_tokens, limit)
            for share in shares
        )

    @property
    def further_slot(self) -> int:
        """The bytes that each further slot needs, where several are computed together."""
        # On several GPUs the mean of as many as there are groups: each group has one more.
        groups = 1 if self.gpus == 1 else GROUPS_PER_GPU * self.gpus
        borrows = self.borrows_blocks(self.slots)
        more = self._need(3 * groups, borrows) - self._need(2 * groups, borrows)
        return more // groups

    @functools.cached_property
    def largest(self) -> int:
        """The most slots that fit, at most 64; 0: not even one fits."""
        limit = USABLE * self.available
        # Not all fewer ones need fit: with as many slots as GPUs each has fewer blocks to compute
        # with, borrowed as they are, than in turns.
        fitting = [slots for slots in range(1, 65) if self.need(slots) <= limit]
        return max(fitting, default=0)

    @property
    def slots(self) -> int:
        """The recommended number of slots; 1 on a CPU.

        They are as many as keep a GPU busy, or fewer that leave memory for the activations of more
        blocks (`trainer.gradient_checkpointing=partial`).
        """
        if not on_gpu():
            return 1  # one run keeps all cores busy
        busy = math.ceil(BUSY_TOKENS / self._mean_and_deviation[0])
        fewest = 1
        most = max(1, min(busy, self.largest, MOST_SLOTS))
        if self.borrows_blocks(self.gpus):
            # Each GPU computes passes of its own slots.
            fewest = self.gpus
            counts = range(fewest, max(fewest, min(self.gpus * busy, MOST_SLOTS)) + 1)
            most = max(filter(self.borrows_blocks, counts))
        fastest = min(range(fewest, most + 1), key=self._time_per_token)
        limit = (1 - CLEAR_GAIN) * self._time_per_token(most)
        return fastest if self._time_per_token(fastest) < limit else most

    def _time_per_token(self, slots: int) -> float:
        """In passes of the mean size, in units of a large pass that computes nothing again."""
        if self.borrows_blocks(slots):
            slots_here = math.ceil(slots / self.gpus)
            tokens = slots_here * self._mean_and_deviation[0]
            # With fewer slots than others, a GPU waits for them.
            return (1 + PASS_TOKENS / tokens) * slots_here * self.gpus / slots
        tokens = slots * self._mean_and_deviation[0]
        limit = USABLE * self.available
        shares = [device.stored_share(slots, tokens, limit) for device in self.devices]
        again = RECOMPUTATION
        if slots == 1:
            again += DEQUANTIZATION_TOKENS / tokens
        return 1 + PASS_TOKENS / tokens + (1 - min(shares)) * again

    def require_room(self, config: RunConfig) -> None:
        """Refuse a run that does not fit.

        Raises:
            ConfigError: Not one slot fits. The message names the key to change.
        """
        if self.largest:
            return
        fullest = self.fullest
        purposes = {
            "the base": fullest.base,
            "activations": fullest.activations.single.peak,
            "evaluation": fullest.activations.evaluating,
        }
        purpose = max(purposes, key=lambda name: purposes[name])
        key, advice = _advice(purpose, config)
        need = f"the run needs {self.need() / GIB:.1f} GiB"
        share = f"most of it for {purpose} ({purposes[purpose] / GIB:.1f})"
        limit = f"of {self.available * USABLE / GIB:.1f} GiB"
        raise ConfigError(f"{key}: {need}, {share}, {limit}; {advice}")


def _advice(purpose: str, config: RunConfig) -> tuple[str, str]:
    """The key that decides how much memory a purpose takes, and how to change it."""
    trainer = config.trainer
    if purpose == "the base":
        if config.quantization.load_in_4bit:
            return "quantization", "take a smaller model"
        return "quantization", "quantization=nf4 needs less"
    if purpose == "evaluation":
        size = trainer.per_device_eval_batch_size
        return f"trainer.per_device_eval_batch_size={size}", "lower it"
    key = f"trainer.per_device_train_batch_size={trainer.per_device_train_batch_size}"
    advice = "lower it (and raise trainer.gradient_accumulation_steps)"
    if not trainer.checkpointing:
        advice += ", or trainer.gradient_checkpointing=true"
    return key, advice
