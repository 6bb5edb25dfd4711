"""Configs of trials are composed as by Hydra's own `load_sweep_config`."""

from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from finetune.config.paths import CONF
from sweeps.study.composition import Composer

COMMANDS = {
    "values": ["lora.r=4", "optimizer.learning_rate=0.003", "trainer.max_steps=7"],
    "folders": ["hydra.sweep.dir='/a b/s'", "hydra.sweep.subdir=trials/3", "lora.r=8"],
    "groups": ["quantization=none", "lora/target=q_v", "lora.dropout=0.1"],
    "a group after values": ["lora.r=4", "lora=r64", "seed=5", "lora.alpha=1"],
    "lists": ["lora.target_modules=[q_proj,v_proj]", "sample_prompts=['a, b',c]"],
    "maps": ["+lora.extra.rank_pattern={q:4}", "lora.extra.rank_pattern={q:8}"],
    "orders": ["+trainer.extra.a=1", "trainer.extra.a=2", "++trainer.extra.a=3", "lora.r=2"],
    "orders of a map": ["+trainer.extra.a=1", "trainer.extra.a=2", "+trainer.extra.b=2"],
    "a value after": ["++trainer.extra.a=3", "lora=r64", "trainer.extra.a=2", "lora/target=q_v"],
    "null and text": ["dataset.limit=null", "model.name_or_path=a/b-c", "name='4'"],
    "interpolation": ["lora.alpha=${lora.r}", "lora.r=3"],
    "removed": ["~lora.extra", "lora.r=3"],
    "a whole section": ["lora.r=4", "lora={r:5}", "lora.alpha=3"],
    "twice": ["lora.r=3", "lora.r=5"],
    "optimizer": ["optimizer=lion", "optimizer.learning_rate=1e-4"],
}  # fmt: skip


@pytest.fixture
def loader() -> Iterator[Any]:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(CONF)):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def sweep(loader: Any) -> DictConfig:
    from hydra.types import RunMode

    overrides = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "lora.r=16"]
    config: DictConfig = loader.load_configuration(
        "config", overrides, run_mode=RunMode.MULTIRUN
    )
    return config


def nodes(config: Container, path: str = "") -> Iterator[tuple[str, Any]]:
    """All containers and values of a config with what is known of each."""
    metadata = config._metadata
    yield path, (type(config), metadata.ref_type, metadata.object_type, metadata.flags)
    keys: Any = range(len(config)) if isinstance(config, ListConfig) else list(config)
    for key in keys:
        assert isinstance(config, DictConfig | ListConfig)
        node = config._get_node(key)
        if isinstance(node, Container) and not node._is_missing():
            yield from nodes(node, f"{path}.{key}")
            continue
        assert node is not None
        yield (
            f"{path}.{key}",
            (type(node), node._value(), node._metadata.ref_type, node._metadata.flags),
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_it_composes_what_hydra_composes(
    name: str, loader: Any, sweep: DictConfig
) -> None:
    composer = Composer(loader, sweep)
    # Others come first, with the same and other files.
    for other in ("values", "groups", "maps", name):
        composer.compose(COMMANDS[other])
    composed = composer.compose(COMMANDS[name])
    expected = loader.load_sweep_config(sweep, COMMANDS[name])
    assert OmegaConf.to_yaml(composed) == OmegaConf.to_yaml(expected)
    assert dict(nodes(composed)) == dict(nodes(expected))
    dirname = "hydra.job.override_dirname"
    assert OmegaConf.select(composed, dirname) == OmegaConf.select(expected, dirname)


@pytest.mark.parametrize(
    "override",
    ["lora.rank=4", "lora.r.a=4", "lora.target=nowhere", "lora/target=nowhere",
     "hydra.sweeper.n_trials=4", "lora.r=choice(1,2)", "hydra.aliases.a=b"],
)  # fmt: skip
def test_errors_are_hydras(override: str, loader: Any, sweep: DictConfig) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  whatever Hydra raises
        loader.load_sweep_config(sweep, ["lora.r=4", override])
    with pytest.raises(type(expected.value)) as raised:
        Composer(loader, sweep).compose(["lora.r=4", override])
    assert str(raised.value) == str(expected.value)


def test_changes_of_a_config_stay_in_it(loader: Any, sweep: DictConfig) -> None:
    composer = Composer(loader, sweep)
    first = composer.compose(["lora.r=4"])
    first.lora.target_modules = ["q_proj"]
    first.hydra.overrides.task.append("x=y")
    again = composer.compose(["lora.r=4"])
    expected = loader.load_sweep_config(sweep, ["lora.r=4"])
    assert OmegaConf.to_yaml(again) == OmegaConf.to_yaml(expected)


def test_files_are_read_once_for_the_same_choices(
    loader: Any, sweep: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    composer = Composer(loader, sweep)
    composer.compose(["lora=r64", "lora.dropout=0.1"])
    monkeypatch.setattr(loader, "load_sweep_config", None)
    composed = composer.compose(["lora.dropout=0.2", "lora=r64"])
    assert composed.lora.r == 64
    assert composed.lora.dropout == 0.2
