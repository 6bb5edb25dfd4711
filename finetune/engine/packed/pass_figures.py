"""What a training pass tells the host: each slot's loss and norm, and how long the pass took."""

import torch

from finetune.engine.packed.gradient_norms import GradientNorms
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
            norms: 2-norm of each slot's gradient, float64 [slots]; on the slots' device.
            timer: Of the pass, stopped.
        """
        self.norms = GradientNorms(norms)
        """Those given, on the device."""
        if losses.device == norms.device:
            # One tensor, so that there is one copy from the GPU for all slots.
            self._copies = [HostCopy(torch.stack([losses, norms]))]
        else:
            # Neither GPU waits for the other.
            self._copies = [HostCopy(losses[None]), HostCopy(norms[None])]
        self._timer = timer
        self._values: list[list[float]] | None = None

    def of_slot(self, index: int) -> tuple[float, float]:
        """Return a slot's loss and norm; waits until the GPU has computed them."""
        losses, norms = self._read()
        return losses[index], norms[index]

    def seconds(self) -> float:
        """Return the duration of the pass; waits as `of_slot` does."""
        self._read()
        return self._timer.seconds()

    def _read(self) -> list[list[float]]:
        if self._values is None:
            self._values = []
            for copy in self._copies:
                self._values += copy.read().tolist()
        return self._values
