"""The heap of a run on a CPU is trimmed during a pass, where its gaps are large."""

import pytest


@pytest.mark.parametrize(
    ("bits", "rows", "trims"),
    [(4, 4, 1), (4, 4096, 1), (4, 16384, 4), (8, 4, 1), (8, 4096, 4)],
)
def test_large_batches_trim_before_every_fourth_layer(
    bits: int, rows: int, trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from finetune.model import heap

    # bitsandbytes' class of this name needs quantised weights.
    layer = type("Linear8bitLt" if bits == 8 else "Linear4bit", (torch.nn.Linear,), {})

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layer(64, 64) for _ in range(9))

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
