"""docs/configuration.md is current, and has every key and every choice."""

from pathlib import Path
from types import ModuleType

from omegaconf import OmegaConf
from support.configs import compose
from support.scripts import load_script

from finetune.config.flatten import flatten
from finetune.config.paths import CONF

DOCS = Path(__file__).resolve().parent.parent / "docs"


def generator() -> ModuleType:
    """The script that writes the page."""
    return load_script(DOCS / "make_configuration.py")


def test_the_page_is_what_the_generator_writes() -> None:
    written = (DOCS / "configuration.md").read_text()
    assert written == generator().render(), "run: python docs/make_configuration.py"


def test_the_page_has_every_key_and_every_choice() -> None:
    text = (DOCS / "configuration.md").read_text()
    keys = list(flatten(compose().to_dict()))
    keys += [
        f"hydra.sweeper.{key}"
        for key in OmegaConf.load(CONF / "hydra/sweeper/optuna.yaml")
    ]
    missing = [key for key in keys if f"| `{key}` |" not in text]
    assert [
        key for key in missing if not key.endswith((".defaults", "._target_", ".extra"))
    ] == []
    for file in CONF.rglob("*/*.yaml"):
        group = file.parent.relative_to(CONF).as_posix()
        assert (
            f"| `{group}` | {file.stem} |" in text
            or f"| `{group}` | **{file.stem}** |" in text
        )
