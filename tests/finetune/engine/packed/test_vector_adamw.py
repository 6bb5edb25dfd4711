"""The update of a slot's weights: PyTorch's AdamW, and the factors that clip its gradient."""

import math

import pytest

from finetune.app import compose_run

STEPS = 5


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_bit_for_bit_as_pytorch_does(decay: float) -> None:
    import torch

    from finetune.engine.packed.vector_adamw import VectorAdamW

    settings = compose_run(
        ["optimizer.learning_rate=1e-3", f"optimizer.weight_decay={decay}"]
    ).optimizer
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1000, generator=generator)
    parameter = torch.nn.Parameter(vector.clone())
    reference = torch.optim.AdamW(
        [parameter],
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=decay,
        fused=True,
    )
    optimizer = VectorAdamW(vector, settings)
    for step in range(STEPS):
        gradient = torch.randn(1000, generator=generator)
        rate = 1e-3 / (step + 1)
        reference.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        reference.step()
        optimizer.update(gradient, rate)
        assert torch.equal(vector, parameter)
    (state,) = optimizer.state.values()
    (reference_state,) = reference.state.values()
    assert state.keys() == reference_state.keys()
    for name, value in reference_state.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_each_slot_is_clipped_by_its_own_norm(loss_scale: float) -> None:
    import torch

    from finetune.engine.packed.gradient_norms import GradientNorms

    scaled = [0.5 * loss_scale, 4.0 * loss_scale, math.nan, math.inf]
    norms = GradientNorms(torch.tensor(scaled, dtype=torch.float64))
    factors = [
        norms.of_slot(index).clip_factor(2.0, loss_scale).item() for index in range(4)
    ]
    assert factors[0] == 1.0
    assert factors[1] == pytest.approx(0.5, rel=1e-6)
    assert math.isnan(factors[2])
    assert factors[3] == 0.0
    # Another run may have another limit, or none of its steps may have overflowed yet.
    assert norms.of_slot(1).clip_factor(1.0, loss_scale).item() == pytest.approx(
        0.25, rel=1e-6
    )
    assert norms.of_slot(1).value.item() == 4.0 * loss_scale
