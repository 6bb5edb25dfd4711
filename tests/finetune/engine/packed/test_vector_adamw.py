"""The update of a slot's weights: PyTorch's AdamW, and the factors that clip its gradient."""

import math

import pytest
from support.runs import Tiny

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
    # Another run of the pass may have another limit, and another loss scale.
    second = norms.of_slot(1)
    assert second.clip_factor(1.0, loss_scale).item() == pytest.approx(0.25, rel=1e-6)
    assert second.clip_factor(2.0, 2 * loss_scale).item() == pytest.approx(1.0)
    assert second.value.item() == 4.0 * loss_scale


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_a_loss_scale_changes_no_step_and_skips_those_that_overflow(
    tiny: Tiny, optimizer: str
) -> None:
    """Scales are powers of two, so a scaled step is the same bits."""
    import torch

    from finetune.engine.packed.gradient_norms import GradientNorm
    from finetune.engine.packed.optimizer import SlotOptimizer
    from finetune.run.resources import SharedResources

    config = tiny(f"optimizer.name={optimizer}", "optimizer.max_grad_norm=2")
    bank = SharedResources().bank(config)
    plain_slot, scaled_slot = (bank.slots.create(config.lora, 0) for _ in range(2))
    plain = SlotOptimizer(config, plain_slot, STEPS)
    # As a bank whose products are in float16 has it; nothing is computed in it here.
    bank.dtype = torch.float16
    scaled = SlotOptimizer(config, scaled_slot, STEPS)
    first_scale = scaled.loss_scale
    assert first_scale > 1 == plain.loss_scale
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        gradient = torch.randn(plain_slot.vector.shape, generator=generator)
        scaled_gradient = gradient * scaled.loss_scale
        if step == 2:
            scaled_gradient[3] = math.inf
        else:
            plain.update(gradient, GradientNorm.of(gradient), 1e-3)
        scaled.update(scaled_gradient, GradientNorm.of(scaled_gradient), 1e-3)
        assert torch.equal(scaled_slot.vector, plain_slot.vector)
        assert scaled.loss_scale == first_scale / (2 if step >= 2 else 1)
