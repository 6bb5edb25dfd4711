"""What a study's best.yaml and printed commands take from the winner's run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import Tiny

from finetune.files.atomic import write_json
from finetune.files.run_folder import RunFolder
from finetune.run.identity import run_identity
from finetune.sharing.vllm import template_flag
from sweeps.answer.best import write_best


def finished_run(
    folder: Path, config: Any, base_model: dict[str, Any] | None
) -> RunFolder:
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    identity = run_identity(config, rows=None, base=None) | {"base_model": base_model}
    write_json(run.identity, identity)
    return run


@pytest.mark.parametrize(
    ("base_model", "revision"),
    [
        ({"name": "owner/base", "revision": "c0ffee", "sha256": None}, "c0ffee"),
        ({"name": "base", "revision": None, "sha256": "ab"}, "null"),
        (None, "null"),
    ],
)
def test_best_yaml_has_the_commit_of_a_base_from_the_hub(
    tiny: Tiny, tmp_path: Path, base_model: dict[str, Any] | None, revision: str
) -> None:
    run = finished_run(tmp_path / "study" / "trials" / "3", tiny(), base_model)
    study: Any = SimpleNamespace(folder=tmp_path / "study", name="study")
    winner: Any = SimpleNamespace(number=3)
    write_best(study, winner, run)
    text = (tmp_path / "study" / "experiment" / "best.yaml").read_text()
    model = text.partition("\nmodel:\n")[2]
    assert f"  revision: {revision}\n" in model.partition("\nquantization:")[0]


@pytest.mark.parametrize(
    ("variables", "flag"),
    [
        (
            "{enable_thinking:null}",
            " --default-chat-template-kwargs '{\"enable_thinking\": null}'",
        ),
        (
            "{enable_thinking:false}",
            " --default-chat-template-kwargs '{\"enable_thinking\": false}'",
        ),
    ],
)
def test_the_serve_command_has_the_templates_variables(
    tiny: Tiny, variables: str, flag: str
) -> None:
    assert template_flag(tiny().model.template_kwargs) == ""
    config = tiny(f"+model.template_kwargs={variables}")
    assert template_flag(config.model.template_kwargs) == flag
