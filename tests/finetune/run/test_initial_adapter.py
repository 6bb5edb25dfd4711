"""Training goes on from an adapter (`lora.adapter`): a run's, or a folder of PEFT's."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.configs import compose, tiny_overrides
from support.runs import (
    Tiny,
    final,
    interrupt_and_resume,
    losses,
    saved_adapter,
    train_in_slots,
)

from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.run import run

SHORT = (
    "trainer.max_steps=10",
    "trainer.eval_steps=0",
    "trainer.save_steps=0",
    "sample_prompts=[]",
    "quantization=none",
)


@pytest.fixture(scope="module")
def first(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter."""
    folder = tmp_path_factory.mktemp("first") / "run"
    config = compose(*tiny_overrides(tiny_base), "optimizer.learning_rate=1e-3", *SHORT)
    run(config, folder, RunContext(interactive=False))
    return folder


def first_evaluation(folder: Path) -> float:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    loss: float = next(row["eval/loss"] for row in rows if "eval/loss" in row)
    return loss


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_begins_where_the_other_run_has_ended(
    tiny: Tiny, first: Path, tmp_path: Path, engine: str
) -> None:
    for name, folder in (("run", first), ("peft", first / "adapter")):
        config = tiny(*SHORT, f"lora.adapter={folder}", f"trainer.engine={engine}")
        run(config, tmp_path / name, RunContext(interactive=False))
        assert first_evaluation(tmp_path / name) == pytest.approx(
            final(first)["metrics"]["eval/loss"], rel=1e-5
        )
    assert losses(tmp_path / "run") == losses(tmp_path / "peft")
    assert losses(tmp_path / "run")[-1] < losses(first)[-1]


def test_both_engines_go_on_alike(tiny: Tiny, first: Path, tmp_path: Path) -> None:
    for engine in ("packed", "trl"):
        config = tiny(*SHORT, f"lora.adapter={first}", f"trainer.engine={engine}")
        run(config, tmp_path / engine, RunContext(interactive=False))
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )


def test_beside_a_fresh_adapter_and_resumed(
    tiny: Tiny, first: Path, tmp_path: Path
) -> None:
    configs = [tiny(*SHORT, f"lora.adapter={first}"), tiny(*SHORT, "lora.r=4")]
    together = train_in_slots(configs, tmp_path, 2)
    for number, config in enumerate(configs):
        alone = tmp_path / f"alone{number}"
        run(config, alone, RunContext(interactive=False))
        assert losses(together[number]) == pytest.approx(losses(alone), rel=1e-5)
    interrupt_and_resume(configs[0], tmp_path / "resumed", step=3)
    whole = saved_adapter(tmp_path / "alone0")
    assert saved_adapter(tmp_path / "resumed").equal(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("lora.r=4",), "has lora.r=16, the run 4"),
        (("lora.alpha=4",), "has lora.alpha=16, the run 4"),
        (("lora.use_rslora=true",), "has lora.use_rslora=false, the run true"),
        (("lora.bias=all",), "has lora.bias=none, the run all"),
        (
            ("+lora.extra.rank_pattern={q_proj:4}",),
            "has r=16 for model.layers.0.self_attn.q_proj, the run 4: see "
            "lora.extra.rank_pattern",
        ),
        (
            ("lora/target=q_v",),
            "adapts 14 layers (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj), the run 4 layers (q_proj, v_proj): see lora.target_modules",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_shape_is_refused(
    tiny: Tiny, first: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tiny(*SHORT, f"lora.adapter={first}", *overrides), tmp_path / "run")
    assert str(refused.value) == f"lora.adapter={first}: {message}"
    assert not (tmp_path / "run" / "run.json").exists()


def test_another_base_is_refused(
    tiny: Tiny, first: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "base"
    shutil.copytree(tiny_base, copied)
    config_file = copied / "config.json"
    content = json.loads(config_file.read_text())
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    other = f"model.name_or_path={copied}"
    with pytest.raises(ConfigError, match="was trained on another base: model"):
        run(tiny(*SHORT, f"lora.adapter={first}", other), tmp_path / "run")
    width = content["intermediate_size"]
    config_file.write_text(json.dumps(content | {"intermediate_size": width // 2}))
    peft = f"lora.adapter={first / 'adapter'}"
    with pytest.raises(ConfigError, match=r"was trained on another base: .* shape"):
        run(tiny(*SHORT, peft, other), tmp_path / "run")


def test_a_folder_without_a_usable_adapter_is_refused(
    tiny: Tiny, first: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="has no adapter"):
        run(tiny(*SHORT, f"lora.adapter={tmp_path}"), tmp_path / "run")
    changed = tmp_path / "changed"
    shutil.copytree(first / "adapter", changed)
    config_file = changed / "adapter_config.json"
    content = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(content | {"init_lora_weights": "pissa"}))
    with pytest.raises(ConfigError, match="init_lora_weights=pissa has changed"):
        run(tiny(*SHORT, f"lora.adapter={changed}"), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"lora.init_lora_weights=pissa: must be true"
    ):
        tiny(*SHORT, f"lora.adapter={first}", "lora.init_lora_weights=pissa")
