"""Layers with ranks and scalings of their own in a slot: as TRL trains them, and as alone."""

import json
from pathlib import Path

import pytest
from support.runs import Tiny, losses, saved_adapter, train_in_slots

from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.run import run

SHORT = (
    "trainer.max_steps=20",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
)
LISTED = "lora.target_modules=[q_proj,v_proj,up_proj]"
PATTERNS = {
    "ranks": (
        "+lora.extra.rank_pattern={q_proj:4,layers.1.mlp.up_proj:24}",
        "+lora.extra.alpha_pattern={v_proj:32}",
    ),
    "ranks, rsLoRA": (
        "+lora.extra.rank_pattern={down_proj:2}",
        "lora.use_rslora=true",
    ),
    "some layers": (LISTED, "+lora.extra.layers_to_transform=[1]"),
    "layers by name": (
        LISTED,
        "+lora.extra.layers_to_transform=[0]",
        "+lora.extra.layers_pattern=layers",
    ),
    "without some": ("+lora.extra.exclude_modules=[k_proj,o_proj]",),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "ranks" else pytest.mark.slow) for n in PATTERNS],
)
def test_trains_as_with_trl(tiny: Tiny, tmp_path: Path, name: str) -> None:
    for engine in ("trl", "packed"):
        config = tiny(*SHORT, *PATTERNS[name], f"trainer.engine={engine}")
        run(config, tmp_path / engine, RunContext(interactive=False))
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )
    packed, trl = saved_adapter(tmp_path / "packed"), saved_adapter(tmp_path / "trl")
    assert float((packed - trl).norm() / trl.norm()) < 1e-4


def test_each_slot_has_its_ranks(tiny: Tiny, tmp_path: Path) -> None:
    configs = [
        tiny(*SHORT, *overrides, "lora.dropout=0.1", f"seed={seed}")
        for seed, overrides in enumerate([*PATTERNS.values(), ()])
    ]
    together = train_in_slots(configs, tmp_path, len(configs))
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)
    saved = json.loads((together[0] / "adapter" / "adapter_config.json").read_text())
    assert saved["rank_pattern"] == {"q_proj": 4, "layers.1.mlp.up_proj": 24}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+lora.extra.rank_pattern={q_proj:0}", "must be ranks of at least 1"),
        ("+lora.extra.rank_pattern=4", "must be ranks of at least 1"),
        ("+lora.extra.rank_pattern={nobody:4}", "matches no layer with an adapter"),
        ("+lora.extra.alpha_pattern={nobody:4}", "matches no layer with an adapter"),
        ("+lora.extra.alpha_pattern={q_proj:-1}", "must be numbers above 0"),
        (
            "+lora.extra.exclude_modules='(*'",
            "must be a list of module names, or a reg",
        ),
        ("+lora.extra.exclude_modules=5", "must be a list of module names, or a reg"),
        ("+lora.extra.layers_to_transform=[1]", "cannot be used when"),
    ],
)
def test_refuses_in_one_line(
    tiny: Tiny, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tiny(*SHORT, override), tmp_path / "run")
    assert str(refused.value).startswith("lora.extra")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
