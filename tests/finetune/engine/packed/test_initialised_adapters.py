"""Adapters of slots are copied from a template: each is PEFT's own, bit for bit."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import PACKED, packed_model
from support.models import load_tokenizer
from support.runs import NONE, Tiny

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {
    "rank": ["lora.r=3", "lora.alpha=5"],
    "fraction": ["lora.alpha=0.3", "lora.dropout=0.1"],
    "rsLoRA": ["lora.r=5", "lora.use_rslora=true"],
    "gaussian": ["lora.init_lora_weights=gaussian"],
    "random B": ["lora.init_lora_weights=false"],
    "some layers": ["lora.target_modules=[q_proj,v_proj]"],
    "patterns": ["+lora.extra.rank_pattern={q_proj:4}"],
    "DoRA": ["lora.use_dora=true"],
    "biases": ["lora.bias=lora_only"],
}


def make_bank(architecture: str, tiny: Tiny) -> Any:
    from finetune.engine.packed.bank import Bank

    config = tiny(NONE)
    tokenizer = load_tokenizer(config)
    base = packed_model(architecture, len(tokenizer), tokenizer.eos_token_id)
    return Bank(base, config)


def require_same(model: Any, expected: Any) -> None:
    """Compare weights, modules, their plain values, and PEFT's config."""
    import torch

    assert repr(model) == repr(expected)
    weights = dict(model.named_parameters())
    for name, weight in expected.named_parameters():
        assert weights[name].requires_grad == weight.requires_grad
        assert weights[name].shape == weight.shape
        assert weights[name].dtype == weight.dtype
        if weight.requires_grad:
            assert torch.equal(weights[name], weight)
    assert weights.keys() == dict(expected.named_parameters()).keys()
    modules = dict(model.named_modules())
    for name, module in expected.named_modules():
        assert plain_values(modules[name]) == plain_values(module)
    config = model.peft_config["default"]
    assert config.to_dict() == expected.peft_config["default"].to_dict()


def plain_values(module: Any) -> dict[str, Any]:
    """What a module holds beside tensors and other modules."""
    # PEFT's configs hold sets, whose order is no property of theirs.
    left_out = ("_parameters", "_buffers", "peft_config")
    plain = str | bool | int | float | dict | list | None
    return {
        name: re.sub(" at 0x[0-9a-f]+", "", repr(value))
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in left_out
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_pefts_for_all_settings(name: str, tiny: Tiny) -> None:
    from finetune.model.adapter import add_adapter
    from finetune.model.adapter_templates import AdapterTemplates

    bank = make_bank("Llama", tiny)
    templates = AdapterTemplates(bank.adapters._skeleton)
    # Another one of the same template comes first.
    templates.create(tiny("lora.r=2", *SETTINGS[name][1:]).lora, 1)
    lora = tiny(*SETTINGS[name]).lora
    for seed in (0, 7):
        expected = add_adapter(bank.adapters._skeleton(), lora, seed)
        require_same(templates.create(lora, seed), expected)


@pytest.mark.parametrize("architecture", PACKED)
def test_it_is_pefts_on_every_architecture(architecture: str, tiny: Tiny) -> None:
    from finetune.model.adapter import add_adapter

    bank = make_bank(architecture, tiny)
    lora = tiny("lora.dropout=0.1", "lora.r=4").lora
    expected = add_adapter(bank.adapters._skeleton(), lora, 3)
    require_same(bank.adapters.create(lora, 3), expected)
    (template,) = bank.adapters._templates._templates.values()
    assert template is not None


def test_slots_share_no_weights(tiny: Tiny) -> None:
    bank = make_bank("Llama", tiny)
    lora = tiny().lora
    models = [bank.adapters.create(lora, seed) for seed in (0, 0)]
    first, second = (
        [weight for weight in model.parameters() if weight.requires_grad]
        for model in models
    )
    assert len(first) == len(second) > 0
    assert not {id(weight) for weight in first} & {id(weight) for weight in second}
    addresses = {weight.data_ptr() for weight in first}
    assert not addresses & {weight.data_ptr() for weight in second}


@pytest.mark.parametrize("name", SETTINGS)
def test_adapters_with_shared_weights_are_pefts_too(name: str, tiny: Tiny) -> None:
    from finetune.model.adapter import add_adapter
    from finetune.model.adapter_templates import AdapterTemplates

    bank = make_bank("Llama", tiny)
    templates = AdapterTemplates(bank.adapters._skeleton, shares_weights=True)
    lora = tiny(*SETTINGS[name]).lora
    larger = tiny(*SETTINGS[name], "lora.r=7").lora
    for settings, seed in ((lora, 0), (larger, 0), (lora, 7), (lora, 0), (larger, 0)):
        expected = add_adapter(bank.adapters._skeleton(), settings, seed)
        require_same(templates.create(settings, seed), expected)


def test_weights_are_drawn_once_for_a_rank_and_a_seed(
    tiny: Tiny, monkeypatch: Any
) -> None:
    from finetune.model import adapter_templates

    bank = make_bank("Llama", tiny)
    templates = adapter_templates.AdapterTemplates(
        bank.adapters._skeleton, shares_weights=True
    )

    def address(*overrides: str, seed: int = 0) -> int:
        model = templates.create(tiny("lora.r=4", *overrides).lora, seed)
        return min(w.data_ptr() for w in model.parameters() if w.requires_grad)

    first = address()
    assert address("lora.alpha=3", "lora.dropout=0.1") == first
    others = {address("lora.r=5"), address(seed=1), address("lora.adapter=folder")}
    assert first not in others
    assert address() == first
    (size,) = {w.nbytes for key, w in templates._drawn.items() if key[1] == 4}  # type: ignore[index]
    monkeypatch.setattr(adapter_templates, "SHARED_BYTES", 2 * size)
    address(seed=2)
    assert [(key[1], key[2]) for key in templates._drawn] == [(4, 1), (4, 2)]  # type: ignore[index]
    monkeypatch.setattr(adapter_templates, "SHARED_BYTES", size - 1)
    address(seed=3)
    assert len(templates._drawn) == 2


def test_a_slot_copies_shared_weights(tiny: Tiny) -> None:
    import torch

    from finetune.model.adapter_templates import AdapterTemplates

    bank = make_bank("Llama", tiny)
    bank.adapters._templates = AdapterTemplates(
        bank.adapters._skeleton, shares_weights=True
    )
    lora = tiny().lora
    slot = bank.slots.create(lora, 0)
    begun = slot.vector.clone()
    slot.vector.add_(1)
    assert torch.equal(bank.slots.create(lora, 0).vector, begun)


@pytest.mark.parametrize("shares_weights", [False, True])
@pytest.mark.parametrize(
    "name", sorted(SETTINGS.keys() - {"patterns", "DoRA", "biases"})
)
def test_an_adapter_on_the_modules_of_an_ended_run_is_pefts_too(
    name: str, shares_weights: bool, tiny: Tiny, tmp_path: Path
) -> None:
    import torch

    from finetune.model.adapter import add_adapter
    from finetune.model.adapter_templates import AdapterTemplates

    bank = make_bank("Llama", tiny)
    bank.adapters._templates = AdapterTemplates(bank.adapters._skeleton, shares_weights)
    first = tiny(*SETTINGS[name], "lora.r=9", "lora.alpha=7", "lora.dropout=0.3").lora
    slot = bank.slots.create(first, 4)
    model = slot.model
    with torch.no_grad():
        slot.vector.normal_()
    # What a run does with its model.
    with slot.weights_on_cpu(None):
        model.save_pretrained(tmp_path)
    bank.slots.remove(slot)
    lora = tiny(*SETTINGS[name]).lora
    later = bank.adapters.create(lora, 4)
    assert later is model
    require_same(later, add_adapter(bank.adapters._skeleton(), lora, 4))
    assert bank.adapters.create(lora, 4) is not model


class Wrapper:
    """Passes on what it has not: while it is unpickled, that is everything."""

    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Refusal:
    def __reduce__(self) -> Any:
        raise RuntimeError


@pytest.mark.parametrize(
    "make_value",
    [lambda: lambda x: x, lambda: Wrapper(1), Refusal],
    ids=["lambda", "recursion", "refusal"],
)
def test_a_model_that_cannot_be_pickled_is_adapted_by_peft_each_time(
    make_value: Callable[[], Any], tiny: Tiny
) -> None:
    from finetune.model.adapter import add_adapter
    from finetune.model.adapter_templates import AdapterTemplates

    bank = make_bank("Llama", tiny)

    def skeleton() -> Any:
        model = bank.adapters._skeleton()
        model.activation = make_value()
        return model

    templates = AdapterTemplates(skeleton)
    lora = tiny().lora
    for seed in (0, 1):
        expected = add_adapter(skeleton(), lora, seed)
        model = templates.create(lora, seed)
        assert repr(model) == repr(expected)
        assert model is not templates.create(lora, seed)
    assert list(templates._templates.values()) == [None]


def test_copies_share_what_no_adapter_changes(tiny: Tiny) -> None:
    """Also what can't be pickled, and with modules in several places."""
    import torch
    from peft.tuners.lora import LoraLayer

    from finetune.model.adapter_templates import AdapterTemplates

    bank = make_bank("Llama", tiny)

    def skeleton() -> Any:
        model = bank.adapters._skeleton()
        model.activation = torch.jit.script(torch.nn.ReLU())
        model.again = torch.nn.ModuleList([model.model.layers[0], model.lm_head])
        return model

    templates = AdapterTemplates(skeleton)
    first, second = (
        templates.create(tiny("lora.r=4").lora, seed).get_base_model()
        for seed in (0, 1)
    )
    for model in (first, second):
        assert model.again[0] is model.model.layers[0]
        assert model.again[1] is model.lm_head
    for name, module in first.named_modules():
        theirs = second.get_submodule(name)
        has_adapter = any(isinstance(part, LoraLayer) for part in module.modules())
        is_of_adapter = any(
            part in name for part in ("lora_A", "lora_B", "lora_dropout")
        )
        assert (module is theirs) == (not has_adapter and not is_of_adapter), name


def test_no_more_copies_are_left_than_were_in_use_at_once(tiny: Tiny) -> None:
    bank = make_bank("Llama", tiny)
    templates = bank.adapters._templates
    for targets in ("[q_proj]", "[v_proj]", "[q_proj,v_proj]", "[q_proj]"):
        lora = tiny(f"lora.target_modules={targets}").lora
        slots = [bank.slots.create(lora, seed) for seed in (0, 1, 2)]
        assert len(templates._lent) == 3
        assert not templates._unused
        models = {slot.model for slot in slots}
        for slot in slots:
            bank.slots.remove(slot)
        assert len(templates._unused) == 3
    # The last one that was given back first, and all of them before a new one is made.
    assert {bank.slots.create(lora, 0).model for _ in range(3)} == models
    assert bank.slots.create(lora, 0).model not in models
