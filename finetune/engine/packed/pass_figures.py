"""What a training pass tells the host: each slot's loss and norm, and how long the pass took."""

import torch

from finetune.engine.packed.pass_timer import PassTimer
from finetune.model.device import HostCopy


class PassFigures:
    """The figures of a pass, of which a GPU may still be computing.

    They are copied to the host as soon as they are computed. So the host can queue the next pass
    before it reads them, and the GPU does not wait for the host.
    """

    def __init__(
        self, losses: torch.Tensor, norms: torch.Tensor, timer: PassTimer
    ) -> None:
        """Queue the copy.

        Args:
            losses: Sum of each slot's losses in nats, float64 [slots].
            norms: 2-norm of each slot's gradient, float64 [slots].
            timer: Of the pass, stopped.
        """
        self.norms = norms
        """As given, on the device."""
        # One tensor, so that there is one copy from the GPU for all slots.
        self._copy = HostCopy(torch.stack([losses, norms], 1))
        self._timer = timer
        self._values: list[list[float]] | None = None

    def of_slot(self, index: int) -> tuple[float, float]:
        """Return a slot's loss and norm; waits until the GPU has computed them."""
        loss, norm = self._read()[index]
        return loss, norm

    def seconds(self) -> float:
        """Return the duration of the pass; waits as `of_slot` does."""
        self._read()
        return self._timer.seconds()

    def _read(self) -> list[list[float]]:
        if self._values is None:
            self._values = self._copy.read().tolist()
        return self._values
