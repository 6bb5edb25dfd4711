"""A base whose blocks are on two GPUs trains, evaluates and answers as on one.

The GPUs are pretended (`support.pretend_gpus`): an operation on tensors of two of them is refused.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.banks import load_bank
from support.decoder_bases import random_base
from support.matrix import further
from support.pretend_gpus import GPUS, LABELS, pretend_gpus, spread
from support.spread_bases import (
    assert_resumed_is_alone,
    configs_of,
    llama,
    load_on_pretend_gpus,
    train,
)

from finetune.config.schema import RunConfig
from finetune.engine.packed.requests import ForwardBackward
from finetune.errors import ConfigError

Tiny = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def deep_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight small blocks, whose head is no copy of its embedding."""
    return llama(tiny_base, tmp_path_factory.mktemp("deep") / "base", tied=False)


def compare(
    configs: list[RunConfig], saves: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train(configs, saves)
    assert alone["devices"] == {torch.device("cpu")}
    load_on_pretend_gpus(monkeypatch)
    with pretend_gpus(monkeypatch):
        spread_out = train(configs, saves)
    assert spread_out["devices"] == set(GPUS)
    # Passes of fewer slots: products of other sizes may round otherwise.
    exact = pytest.approx(alone["figures"], rel=1e-4)
    assert spread_out["figures"] == exact
    for mine, theirs in zip(spread_out["gradients"], alone["gradients"], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)
    assert spread_out["answers"] == alone["answers"]


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    ("count", "dropout", "saves"),
    [
        (1, 0, False),
        (2, 0.3, True),
        pytest.param(5, 0.3, False, marks=pytest.mark.slow),
        *further((5, 0, True)),
    ],
)
def test_with_autograd(
    tiny: Tiny,
    deep_base: Path,
    count: int,
    dropout: float,
    saves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = f"lora.dropout={dropout}", f"trainer.gradient_checkpointing={saves}"
    compare(configs_of(tiny, deep_base, count, *more), None, monkeypatch)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    "quantization",
    [
        "nf4",
        *further("nf4_double"),
        pytest.param("int8", marks=pytest.mark.slow),
    ],
)
def test_of_a_quantised_base(
    tiny: Tiny, deep_base: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.quantization.DEQUANTIZED_SHARE", 0)
    more = f"quantization={quantization}", "trainer.gradient_checkpointing=true"
    compare(configs_of(tiny, deep_base, 3, *more), None, monkeypatch)


@pytest.mark.usefixtures("fresh_cache")
def test_of_a_base_whose_head_is_its_embedding(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama(tiny_base, tmp_path / "tied", tied=True)
    compare(configs_of(tiny, folder, 3), None, monkeypatch)


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_5_text", "ministral3"])
def test_of_other_architectures(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks and angles by the type of layer, recurrent layers, scaled queries."""
    folder = random_base(architecture, tiny_base, tmp_path / "base")
    compare(configs_of(tiny, folder, 3), None, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("saves", [True, *further(False)])
def test_with_the_decoder_by_hand(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    saves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = llama(tiny_base, tmp_path / "base", tied=False, layers=2)
    configs = configs_of(tiny, folder, 2, "lora.dropout=0.2")
    compare(configs, saves, monkeypatch)


@pytest.mark.matrix
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3_5_text", "ministral3"])
def test_with_the_decoder_by_hand_of_other_architectures(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = random_base(architecture, tiny_base, tmp_path / "base")
    compare(configs_of(tiny, folder, 2), True, monkeypatch)


def test_a_run_goes_on_from_its_checkpoint(
    tiny: Tiny, deep_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: optimizer, evaluations, samples, checkpoints, adapter."""
    from finetune.run.context import RunContext
    from finetune.run.resources import SharedResources
    from finetune.run.run import run

    config = tiny(
        f"model.name_or_path={deep_base}", "trainer.save_steps=2", "trainer.max_steps=6"
    )

    def complete(folder: Path) -> None:
        run(config, folder, RunContext(interactive=False, resources=SharedResources()))

    def spread_base() -> None:
        load_on_pretend_gpus(monkeypatch)

    assert_resumed_is_alone(complete, spread_base, tmp_path, monkeypatch)


def test_the_pretended_gpus_find_a_base_that_does_not_move_its_inputs(
    tiny: Tiny, deep_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.layer_devices.move_inputs", lambda base: None)
    # The probe of the bank meets it first.
    with pytest.raises(ConfigError, match=r"MixedDevices: .* on xpu:1"):
        compare(configs_of(tiny, deep_base, 1), None, monkeypatch)


def test_between_gpus_go_hidden_states_alone(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other copy would wait for what both GPUs have to compute, before the blocks can begin."""
    from support import pretend_gpus as pretended

    from finetune.engine.packed.backends import Backends
    from finetune.engine.packed.batch import lay_out

    folder = llama(tiny_base, tmp_path / "base", tied=False, layers=2)
    (config,) = configs_of(tiny, folder, 1)
    load_on_pretend_gpus(monkeypatch)
    monkeypatch.setattr(Backends, "check", lambda *_: None)
    copies = []
    copied = pretended._copied

    def counting(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append((LABELS.of(x), device, tuple(x.shape)))
        return copied(x, device)

    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    with pretend_gpus(monkeypatch):
        bank = load_bank(config, True)
        slot = bank.slots.create(config.lora, 1)
        request = ForwardBackward(slot, rows, 0.1, 1, layout=lay_out(rows))
        bank.forward_backward([request])
        monkeypatch.setattr(pretended, "_copied", counting)
        bank.forward_backward([request])
    between = [copy for copy in copies if set(copy[:2]) == set(GPUS)]
    # The last token predicts nothing, and is not computed.
    hidden = (3, 64)
    assert between == [(*GPUS, hidden), (*reversed(GPUS), hidden)]


def test_what_all_blocks_get_is_copied_once_to_each_gpu(
    tiny: Tiny, deep_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import pretend_gpus as pretended

    from finetune.engine.probes import plain_logits
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny(f"model.name_or_path={deep_base}")
    copies = []
    copied = pretended._copied

    def counting(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        copies.append((LABELS.of(x), device, tuple(x.shape)))
        return copied(x, device)

    with pretend_gpus(monkeypatch), torch.no_grad():
        base = spread(load_base(find_base(config.model), config))
        monkeypatch.setattr(pretended, "_copied", counting)
        plain_logits(base, [5, 6, 7])
    between = [shape for source, target, shape in copies if (source, target) == GPUS]
    # The hidden states, cosines and sines, and at most the positions.
    assert len(between) <= 4
    assert len([shape for shape in between if shape == (1, 3, 64)]) == 1
