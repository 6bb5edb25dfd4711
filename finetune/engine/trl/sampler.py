"""The order of the rows, for TRL's trainer."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from finetune.config.schema import RunConfig
from finetune.engine.schedule import epoch_order


class EpochSampler(Sampler[int]):
    """Draws the rows of each epoch in the order that both engines share (`epoch_order`)."""

    def __init__(self, lengths: list[int], config: RunConfig) -> None:
        """Draw training rows.

        Args:
            lengths: Tokens of each row.
            config: The run's config.
        """
        self._lengths = lengths
        self._config = config
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch. accelerate calls it when an epoch begins, a resumed one too."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        trainer = self._config.trainer
        order = epoch_order(
            self._lengths,
            trainer.effective_batch_size,
            self._config.seed,
            self._epoch,
            trainer.group_by_length,
        )
        return iter(order)

    def __len__(self) -> int:
        return len(self._lengths)
