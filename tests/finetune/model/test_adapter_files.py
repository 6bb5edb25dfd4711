"""The files of an adapter: the base's name, the ends of answers, and that PEFT loads them."""

import json
from pathlib import Path

import pytest
from support.bases import with_changed_json
from support.models import load_tokenizer
from support.runs import SHORT, Tiny

from finetune.model.packaged import SMOLLM2
from finetune.model.source import BaseSource
from finetune.run.run import run

pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.mark.parametrize("engine", ["packed", "trl"])
@pytest.mark.parametrize("objective_at", ["last", "best"])
def test_no_file_names_a_folder_of_this_machine(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, engine: str, objective_at: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune.run.load import load_run

    overrides = (
        f"trainer.engine={engine}",
        f"objective_at={objective_at}",
        "quantization=none",
    )
    run(tiny(*overrides, *SHORT), tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    for file in adapter.iterdir():
        if file.suffix != ".safetensors":
            assert str(tiny_base.parent) not in file.read_text(), file.name
    assert json.loads((adapter / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == (tiny_base.name)
    assert f"base_model: {tiny_base.name}\n" in (adapter / "README.md").read_text()

    ids = torch.arange(9)[None]
    with torch.no_grad():
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_base), adapter
        )
        expected = load_run(tmp_path / "run").with_adapter()(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (BaseSource("owner/base", "owner/base", revision="c0ffee"), "owner/base"),
        (BaseSource(".", SMOLLM2.name, sha256=SMOLLM2.sha256), SMOLLM2.hub_id),
        # A folder of the user's.
        (BaseSource(".", SMOLLM2.name), SMOLLM2.name),
        (BaseSource(".", "/data/models/base"), "base"),
        (BaseSource(".", "../models/base/"), "base"),
        (BaseSource(".", "~/base"), "base"),
    ],
)
def test_the_public_name_of_a_base(source: BaseSource, name: str) -> None:
    assert source.public_name == name


def test_a_base_on_the_hub_is_named_with_its_commit(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.model.adapter import add_adapter, save_adapter
    from finetune.model.loading import load_base
    from finetune.model.origin import remember_origin
    from finetune.model.source import find_base

    config = tiny("quantization=none")
    base = load_base(find_base(config.model), config)
    remember_origin(base, BaseSource("owner/base", "owner/base", revision="c0ffee"))
    model = add_adapter(base, config.lora, config.seed)
    save_adapter(model, load_tokenizer(config), tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["base_model_name_or_path"], values["revision"]) == (
        "owner/base",
        "c0ffee",
    )
    assert model.peft_config["default"].base_model_name_or_path == str(tiny_base)


def generation_config(folder: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads(
        (folder / "generation_config.json").read_text()
    )
    return values


ENDS = {
    "the template's": ({}, {}, [1]),
    "and the base's": ({}, {"eos_token_id": 7}, [1, 7]),
    "and several of the base's": ({}, {"eos_token_id": [9, 7]}, [1, 7, 9]),
    "an unusual temperature": ({}, {"eos_token_id": 1, "temperature": 0.6}, [1]),
    "of a template with another end": (
        {
            "chat_template": "{{ messages[0].content }}A{{ messages[-1].content }}<|im_start|>"
        },
        {"eos_token_id": 1},
        [0, 1],
    ),
}


@pytest.mark.parametrize("engine", ["packed", "trl"])
@pytest.mark.parametrize("kind", list(ENDS))
def test_the_saved_generation_config_holds_the_ends_that_were_learnt(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, kind: str, engine: str
) -> None:
    _model, generation, ends = ENDS[kind]
    template = ENDS[kind][0].get("chat_template")
    file = "generation_config.json"
    base = with_changed_json(tiny_base, tmp_path / "base", file, **generation)
    overrides = [
        f"model.name_or_path={base}",
        f"trainer.engine={engine}",
        "quantization=none",
    ]
    if template:
        overrides.append(f"model.chat_template='{template}'")
    run(tiny(*overrides, *SHORT), tmp_path / "run")
    saved = generation_config(tmp_path / "run" / "adapter")
    original = json.loads((base / file).read_text())
    assert saved["eos_token_id"] == ends
    for key in ("pad_token_id", "temperature"):
        assert saved.get(key) == original.get(key)


@pytest.mark.slow
def test_a_merged_model_has_the_same_generation_config(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import merge

    file = "generation_config.json"
    changes = {"eos_token_id": 7, "temperature": 0.6}
    base = with_changed_json(tiny_base, tmp_path / "base", file, **changes)
    run(
        tiny(f"model.name_or_path={base}", "quantization=nf4", *SHORT), tmp_path / "run"
    )
    command = ["merge", str(tmp_path / "run"), "--to", str(tmp_path / "merged")]
    monkeypatch.setattr("sys.argv", command)
    merge.main()
    merged = generation_config(tmp_path / "merged")
    assert merged == generation_config(tmp_path / "run" / "adapter")
    assert merged["eos_token_id"] == [1, 7]
    again = tiny(
        f"model.name_or_path={tmp_path / 'merged'}", "quantization=none", *SHORT
    )
    run(again, tmp_path / "again")  # starts from it
