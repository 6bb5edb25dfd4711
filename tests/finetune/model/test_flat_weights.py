"""An adapter's weights as one vector, and as tensors of their own that share its memory."""

from typing import Any

import pytest

from finetune.model.adapter_files import WEIGHTS


def parameters_of(vector: Any) -> list[Any]:
    import torch

    return [
        torch.nn.Parameter(vector[:6].view(2, 3)),
        torch.nn.Parameter(vector[6:10].view(4, 1)),
        torch.nn.Parameter(vector[10:12]),
    ]


def test_weights_that_are_one_vector_are_not_copied() -> None:
    import torch

    from finetune.model.flat_weights import flatten_weights

    vector = torch.randn(12)
    flat = flatten_weights(parameters_of(vector))
    assert flat.data_ptr() == vector.data_ptr()
    assert torch.equal(flat, vector)
    assert not flat.requires_grad


@pytest.mark.parametrize("case", ["order", "apart", "more", "gap", "transposed"])
def test_other_weights_are_put_together(case: str) -> None:
    import torch

    from finetune.model.flat_weights import flatten_weights

    parameters = parameters_of(torch.randn(12))
    if case == "order":
        parameters.reverse()
    elif case == "apart":
        parameters[1] = torch.nn.Parameter(torch.randn(4, 1))
    elif case == "more":
        parameters = parameters_of(torch.randn(14))
    elif case == "gap":
        del parameters[1]
    else:
        parameters[0] = torch.nn.Parameter(parameters[0].detach().view(3, 2).T)
    flat = flatten_weights(parameters)
    assert torch.equal(flat, torch.cat([each.flatten() for each in parameters]))
    assert flat.data_ptr() != min(each.data_ptr() for each in parameters)


def test_views_that_are_written_without_a_copy() -> None:
    import torch
    from peft.utils.other import id_tensor_storage

    from finetune.model.flat_weights import separate_views

    parameters = parameters_of(torch.randn(12))
    vector = torch.randn(12)
    expected = parameters_of(vector.clone())
    views = separate_views(vector, parameters)
    assert len({id_tensor_storage(view) for view in views}) == len(views)
    assert views[0].data_ptr() == vector.data_ptr()
    # They keep the memory.
    del vector
    torch.randn(12)
    for view, values in zip(views, expected, strict=True):
        assert torch.equal(view, values)


def test_a_slot_saves_the_bytes_that_peft_saves_of_its_views(
    tiny: Any, tmp_path: Any
) -> None:
    from support.models import load_tokenizer

    from finetune.model.adapter import save_adapter
    from finetune.run.resources import SharedResources

    config = tiny()
    slot = SharedResources().bank(config).slots.create(config.lora, 0)
    slot.vector.uniform_(-1, 1)
    tokenizer = load_tokenizer(config)
    save_adapter(slot.model, tokenizer, tmp_path / "views")
    addresses = [weight.data_ptr() for weight in slot.parameters]
    with slot.weights_on_cpu(None):
        save_adapter(slot.model, tokenizer, tmp_path / "apart")
    assert [weight.data_ptr() for weight in slot.parameters] == addresses
    views, apart = (tmp_path / name / WEIGHTS for name in ("views", "apart"))
    assert views.read_bytes() == apart.read_bytes()
