"""The command `finetune.export`: files for llama.cpp and Ollama, complete or not at all."""

import hashlib
import json
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.configs import compose, tiny_overrides
from support.tiny_base import give_biases

from finetune import export, merge
from finetune.errors import ConfigError
from finetune.model.gguf.modelfile import ollama_name
from finetune.run import exporting, merging
from finetune.run.merging import MergedModel


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, on a tiny Llama."""
    from finetune.run.context import RunContext
    from finetune.run.run import run

    folder = tmp_path_factory.mktemp("export") / "run"
    config = compose(
        *tiny_overrides(tiny_base),
        "trainer.max_steps=2",
        "optimizer.learning_rate=0.02",
    )
    run(config, folder, RunContext(interactive=False))
    return folder


@pytest.fixture
def named(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny base's tokenizer has a name in llama.cpp."""
    from transformers import AutoTokenizer

    from finetune.model.gguf.pre_tokenizers import PRE_TOKENIZERS, TEXT

    ids = AutoTokenizer.from_pretrained(tiny_base).encode(TEXT)
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setitem(PRE_TOKENIZERS, digest, "gpt-2")


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export", *words])
    export.main()


@pytest.mark.usefixtures("named")
def test_a_run_becomes_a_file_and_a_modelfile(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.run.load import load_run

    folder = tmp_path / "My Model"
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, str(trained), "--to", "My Model", "--format", "gguf")
    shown = capsys.readouterr().out

    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["My Model"]
    text = (folder / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ $role := "" }}')
    assert text.endswith('"""\nPARAMETER stop "<|im_end|>"\n')
    assert shown.splitlines()[0] == "My Model/model.gguf: float16, 0 MB"
    assert "loaded again: 0.0e+00 nats per token from the merged model; " in shown
    create = "ollama create my-model -f 'My Model/Modelfile' && ollama run my-model"
    assert f"Ollama: {create}\n" in shown
    assert "llama-server -m 'My Model/model.gguf' --jinja" in shown
    # The whole chain, without the command's own check: the file predicts what the adapter predicts.
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    ids = torch.tensor([tokenizer("What does math.gcd do in Python?")["input_ids"]])
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file="model.gguf", dtype=torch.float32
        )
        actual = model(input_ids=ids).logits
        expected = load_run(trained).with_adapter()(input_ids=ids).logits
    assert (actual - expected).abs().max() < 0.01


@pytest.mark.usefixtures("named")
def test_json_says_what_was_written(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "exported"
    call(monkeypatch, str(trained), "--to", str(folder), "--quantize", "q8_0", "--json")
    shown = json.loads(capsys.readouterr().out)

    assert shown["file"] == str(folder / "model.gguf")
    assert shown["type"] == "q8_0"
    assert shown["bytes"] == (folder / "model.gguf").stat().st_size
    assert shown["checked"] is True
    assert 0 < shown["divergence"] < 0.05
    assert shown["merge"].keys() == {"dtype", "effect", "verdict"}


def test_a_tokenizer_without_a_name_is_refused_before_the_base_loads(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "merge_run", None)
    with pytest.raises(ConfigError, match="cuts texts by a rule that has no name"):
        call(monkeypatch, str(trained), "--to", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_of_the_converter_alone_is_refused_before_the_base_loads(
    trained: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"model_type": "olmo2"}))
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    identity = json.loads((run / "run.json").read_text())
    identity["config"]["model"]["name_or_path"] = str(base)
    (run / "run.json").write_text(json.dumps(identity))
    monkeypatch.setattr(exporting, "merge_run", None)

    problem = "of its base base, the architecture olmo2 .*; --llama-cpp FOLDER exports"
    with pytest.raises(ConfigError, match=f"^RUN={run}: {problem}"):
        call(monkeypatch, str(run), "--to", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("named")
def test_a_file_that_is_not_the_model_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.model.gguf import vocabulary

    pairs: Any = vocabulary._pairs
    monkeypatch.setattr(vocabulary, "_pairs", lambda each: list(pairs(each))[9:])
    with pytest.raises(
        ConfigError, match="is not the model: its tokenizer gives other"
    ):
        call(monkeypatch, str(trained), "--to", str(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [("My Model", "my-model"), ("s1", "s1"), ("Ä/b_", "b"), ("…", "model")],
)
def test_a_name_is_one_that_ollama_takes(name: str, expected: str) -> None:
    assert ollama_name(name) == expected


def with_lora_bias(trained: Path, base: Path, folder: Path, *targets: str) -> Path:
    """A run's folder whose adapter on a base has biases."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils.warning import PeftWarning
    from transformers import AutoModelForCausalLM

    shutil.copytree(trained, folder)
    identity = json.loads((folder / "run.json").read_text())
    identity["config"]["model"]["name_or_path"] = str(base)
    (folder / "run.json").write_text(json.dumps(identity))
    settings = LoraConfig(r=4, target_modules=list(targets), lora_bias=True)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        # Of layers without a bias, and of weights with one dimension.
        warnings.simplefilter("ignore", PeftWarning)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.1)
        model.save_pretrained(folder / "adapter")
    return folder


def test_a_bias_for_a_layer_without_one_is_refused_before_the_base_loads(
    trained: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_lora_bias(trained, tiny_base, tmp_path / "run", "q_proj")
    monkeypatch.setattr(merging, "load_run", None)
    monkeypatch.setattr(sys, "argv", ["merge", str(run), "--to", str(tmp_path / "new")])
    layer = "model.layers.0.self_attn.q_proj"
    problem = f"was trained with lora_bias, and the base's layer {layer} has no bias"
    with pytest.raises(ConfigError, match=f"^RUN={run}: its adapter {problem}, so"):
        merge.main()
    assert not (tmp_path / "new").exists()


def test_a_bias_for_a_layer_with_one_is_merged(
    trained: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    give_biases(base)
    run = with_lora_bias(trained, base, tmp_path / "run", "q_proj", "v_proj")
    merged = merging.merge_run(run, tmp_path / "new", "float32")
    assert merged.verdict.startswith("fine: ")
    assert merged.effect > 0


@pytest.mark.parametrize("name", ["merged", "my merged", "it's, (two)"])
def test_merge_prints_a_command_that_starts_from_the_merged_model(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(merge, "find_run", lambda *_: tmp_path)
    monkeypatch.setattr(
        merge,
        "merge_run",
        lambda _, folder, dtype: MergedModel(folder, 0.0, 0.0, 0.0, dtype, "fine"),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["merge", "run", "--to", name])
    merge.main()
    line = capsys.readouterr().out.splitlines()[0]
    command = line.removeprefix(f"merged model in {name}: ")
    words = shlex.split(command.removesuffix(" starts from it"))
    assert words[:3] == ["python", "-m", "finetune"]
    assert compose(*words[3:]).model.name_or_path == name


def test_merge_prints_json_too(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(tmp_path / "merged")
    monkeypatch.setattr(sys, "argv", ["merge", str(trained), "--to", folder, "--json"])
    merge.main()
    shown = json.loads(capsys.readouterr().out)
    assert (shown["folder"], shown["dtype"]) == (folder, "bfloat16")
    assert 0 <= shown["difference"] < shown["difference_rounded"]
    assert shown["effect"] > 0
    assert shown["verdict"].startswith(("fine: ", "not fine: "))
