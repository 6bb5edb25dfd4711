"""Passes are interleaved on devices, so that each device has work."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from finetune.engine.packed.pipeline import PassSteps, group_size, interleave

GPUS = [torch.device("cuda", number) for number in range(4)]
AHEAD = 5
"""Steps that a GPU takes before the host waits for it."""


class Host:
    """Launches steps of one unit of time each on GPUs that compute them in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[torch.device, list[float]] = {gpu: [] for gpu in GPUS}

    def launch(self, device: torch.device, after: float) -> float:
        """Launch a step that needs a result of a time; return when it ends."""
        queue = self.ends[device]
        if len(queue) >= AHEAD:
            # The queue has room when the step so many places before this one has ended.
            self.now = max(self.now, queue[-AHEAD])
        begins = max(self.now, after, queue[-1] if queue else 0.0)
        queue.append(begins + 1)
        return begins + 1

    def end(self) -> float:
        return max(queue[-1] for queue in self.ends.values() if queue)


def walk(host: Host, devices: list[torch.device], name: int) -> PassSteps[int]:
    ended = 0.0
    for device in devices:
        yield device
        ended = host.launch(device, ended)
    return name


@pytest.mark.parametrize(
    ("gpus", "blocks", "groups"), [(2, 40, 4), (4, 20, 8), (2, 3, 2)]
)
def test_gpus_work_at_the_same_time(gpus: int, blocks: int, groups: int) -> None:
    devices = [gpu for gpu in GPUS[:gpus] for _ in range(blocks)]
    together, apart = Host(), Host()
    named = interleave([walk(together, devices, name) for name in range(groups)])
    assert named == [*range(groups)]
    for name in range(groups):
        interleave([walk(apart, devices, name)])
    # The shortest that a pipeline can take.
    assert together.end() == blocks * (gpus + groups - 1)
    if blocks > AHEAD:
        assert apart.end() > 1.2 * together.end()


def test_the_first_pass_goes_first_and_each_step_is_in_order() -> None:
    order = []

    def walk(name: str, devices: list[int]) -> PassSteps[str]:
        for number in devices:
            yield GPUS[number]
            order.append(f"{name}{number}")
        return name

    assert interleave([walk("a", [0, 1]), walk("b", [0, 1]), walk("c", [])]) == [*"abc"]
    assert order == ["a0", "a1", "b0", "b1"]


def test_after_an_error_no_pass_is_left_open() -> None:
    closed = []

    def walk(fails: bool) -> PassSteps[None]:
        try:
            for number in itertools.count():
                yield GPUS[0]
                if fails and number == 3:
                    raise MemoryError
        finally:
            closed.append(fails)

    passes: Iterator[PassSteps[None]] = map(walk, (True, False))
    with pytest.raises(MemoryError):
        interleave([*passes])
    assert closed == [True, False]


@pytest.mark.parametrize(
    ("slots", "gpus", "size"),
    [(1, 1, 1), (8, 1, 8), (1, 2, 1), (4, 2, 1), (5, 2, 2), (8, 2, 2), (9, 4, 2)],
)
def test_slots_of_a_group(slots: int, gpus: int, size: int) -> None:
    assert group_size(slots, gpus) == size
