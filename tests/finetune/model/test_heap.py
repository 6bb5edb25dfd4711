"""The heap of a run on a CPU is trimmed during a pass, where its gaps are large."""

import pytest


@pytest.mark.parametrize(("rows", "trims"), [(4, 1), (4096, 4)])
def test_large_batches_trim_before_every_fourth_layer(
    rows: int, trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from finetune.model import heap

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(9))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                states = layer(states)
            return states

    calls: list[None] = []
    monkeypatch.setattr(heap, "trim_heap", lambda: calls.append(None))
    decoder = Decoder()
    states = torch.zeros(rows, 64)
    with heap.trimmed_heap(decoder):
        decoder(states)
    assert len(calls) == trims
    decoder(states)
    assert len(calls) == trims
