"""A base that is quantised already is used as it is and said so, or refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.bases import make_base, quantized_base, with_changed_json
from support.configs import tiny_overrides
from support.matrix import further
from support.models import changed_copy
from support.runs import SHORT, Tiny, final

from finetune.errors import ConfigError
from finetune.run.quantization import resolve_quantization
from finetune.run.resources import SharedResources
from finetune.run.run import run

pytestmark = pytest.mark.usefixtures("fresh_cache")

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nf4": FOUR_BITS,
    "nf4_double": FOUR_BITS | {"bnb_4bit_use_double_quant": True},
    "fp4": FOUR_BITS | {"bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base saved with each quantization of bitsandbytes."""
    folder = tmp_path_factory.mktemp("quantised")
    untied = changed_copy(tiny_base, folder / "untied", tie_word_embeddings=False)
    return {
        name: quantized_base(untied, folder / name, **arguments)
        for name, arguments in ARGUMENTS.items()
    }


@pytest.mark.parametrize(
    ("base", "asked"),
    [("nf4", "none"), ("nf4", "nf4"), ("nf4", "nf4_double"), ("nf4_double", "none"), ("fp4", "none"),
     ("fp4", "fp4"), ("int8", "none"), ("int8", "int8")],
)  # fmt: skip
def test_it_is_used_as_it_is_and_the_files_say_so(
    tiny: Tiny, bases: dict[str, Path], tmp_path: Path, base: str, asked: str
) -> None:
    from finetune.run.load import load_run

    config = tiny(f"model.name_or_path={bases[base]}", f"quantization={asked}", *SHORT)
    run(config, tmp_path / "run")

    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["config"][
        "quantization"
    ]
    method = base.removesuffix("_double")
    assert final(tmp_path / "run")["quantization"] == method
    assert recorded["load_in_8bit"] == (method == "int8")
    assert recorded["load_in_4bit"] == (method != "int8")
    if method != "int8":
        assert recorded["bnb_4bit_quant_type"] == method
        assert recorded["bnb_4bit_use_double_quant"] == base.endswith("_double")
    layers = {
        type(module).__name__ for module in load_run(tmp_path / "run").base.modules()
    }
    assert ("Linear8bitLt" if method == "int8" else "Linear4bit") in layers


@pytest.mark.parametrize(
    ("base", "asked", "key"),
    [("nf4", "fp4", "quantization.bnb_4bit_quant_type=fp4"),
     ("nf4", "int8", "quantization.load_in_8bit=true"),
     ("fp4", "nf4", "quantization.bnb_4bit_quant_type=nf4"),
     ("int8", "nf4", "quantization.bnb_4bit_quant_type=nf4")],
)  # fmt: skip
def test_another_quantization_is_refused_before_the_weights_load(
    tiny: Tiny, bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, base: str,
    asked: str, key: str,
) -> None:  # fmt: skip
    config = tiny(f"model.name_or_path={bases[base]}", f"quantization={asked}", *SHORT)
    with caplog.at_level("INFO"), pytest.raises(ConfigError) as refused:
        run(config, tmp_path / "run")
    allowed = (
        f"allowed: quantization={base}, or quantization=none, which uses it as it is"
    )
    name = f"model.name_or_path={bases[base]}"
    assert (
        str(refused.value) == f"{key}: {name} is quantised already ({base}); {allowed}"
    )
    assert "training on the CPU" not in caplog.text


OTHER_METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize("method", list(OTHER_METHODS))
@pytest.mark.parametrize("asked", ["nf4", "fp4", "int8"])
def test_bitsandbytes_on_another_method_is_refused(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, method: str, asked: str
) -> None:
    section = OTHER_METHODS[method]
    folder = with_changed_json(
        tiny_base, tmp_path / "base", quantization_config=section
    )
    config = tiny(f"model.name_or_path={folder}", f"quantization={asked}")
    if method == "mxfp4" and asked != "int8":
        # Quantised again when it is loaded.
        assert resolve_quantization(config, SharedResources()) == config
        return
    with pytest.raises(ConfigError) as refused:
        resolve_quantization(config, SharedResources())
    reason = f"model.name_or_path={folder} is quantised already ({method})"
    allowed = "allowed: quantization=none, which uses it as it is"
    if method == "mxfp4":
        allowed = (
            "allowed: quantization=nf4, or quantization=none, which dequantises it"
        )
    assert str(refused.value).endswith(f": {reason}; {allowed}")
    without = tiny(f"model.name_or_path={folder}", "quantization=none")
    assert resolve_quantization(without, SharedResources()) == without


@pytest.mark.parametrize("method", ["fbgemm_fp8", "bitnet", "higgs"])
def test_a_method_that_cannot_be_trained_is_refused_before_the_weights_load(
    tiny: Tiny,
    tiny_base: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    section = {"quant_method": method}
    folder = with_changed_json(
        tiny_base, tmp_path / "base", quantization_config=section
    )
    config = tiny(f"model.name_or_path={folder}", "quantization=none", *SHORT)
    with caplog.at_level("INFO"), pytest.raises(ConfigError) as refused:
        run(config, tmp_path / "run")
    assert str(refused.value).startswith(
        f"model.name_or_path={folder}: is quantised already ({method}), and transformers can't"
    )
    assert "training on the CPU" not in caplog.text


def merge(folder: Path, to: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "finetune.merge", str(folder), "--to", str(to)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "int8", *further("nf4_double", "fp4")])
def test_a_run_on_it_is_merged_into_plain_weights(
    tiny: Tiny, bases: dict[str, Path], tmp_path: Path, base: str
) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny(f"model.name_or_path={bases[base]}", "quantization=none", *SHORT)
    run(config, tmp_path / "run")
    done = merge(tmp_path / "run", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged/config.json").read_text()
    )
    _model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_run_on_gptq_is_not_merged_and_leaves_no_folder(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    folder = with_changed_json(tiny_base, tmp_path / "base")
    run(
        tiny(f"model.name_or_path={folder}", "quantization=none", *SHORT),
        tmp_path / "run",
    )
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = OTHER_METHODS["gptq"]
    (folder / "config.json").write_text(json.dumps(values))
    done = merge(tmp_path / "run", tmp_path / "merged")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is quantised (gptq), and can't be merged into" in line
    assert {path.name for path in tmp_path.iterdir()} >= {"base", "run"}
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_gpt2s_transposed_weights_are_merged_as_its_class_reads_them(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from finetune.run.load import load_run
    from finetune.run.merging import merge as merge_adapter

    base = make_base(tiny_base, tmp_path / "base", "gpt2", n_positions=64)
    config = tiny(f"model.name_or_path={base}", "quantization=nf4", *SHORT)
    run(config, tmp_path / "run")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = load_run(tmp_path / "run").with_adapter()(input_ids=ids).logits
        merged = merge_adapter(
            load_run(tmp_path / "run").base, tmp_path / "run" / "adapter"
        )
        merged.save_pretrained(tmp_path / "merged")
        actual = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(
            input_ids=ids
        ).logits
    assert torch.allclose(actual, expected, atol=1e-4)


@pytest.fixture(scope="module")
def experts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, whose experts transformers keeps in one tensor."""
    return make_base(
        tiny_base, tmp_path_factory.mktemp("experts") / "base", "qwen3_moe"
    )


def test_experts_that_stay_in_16_bits_are_said_with_their_size(
    tiny: Tiny, experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    def lines(quantization: str) -> list[str]:
        caplog.clear()
        config = tiny(f"model.name_or_path={experts}", f"quantization={quantization}")
        with caplog.at_level("INFO"):
            load_base(find_base(config.model), config)
        return [line for line in caplog.messages if line.startswith("quantization: ")]

    (line,) = lines("int8")
    assert line.startswith(
        "quantization: 4 weights of experts stay in float32, 0.00 GiB: model.la"
    )
    assert lines("nf4") == []
    assert lines("none") == []


@pytest.mark.parametrize(
    ("quantization", "shown"), [("int8", True), ("nf4", False), ("none", False)]
)
def test_a_plan_counts_experts_as_they_are(
    tiny: Tiny,
    experts: Path,
    quantization: str,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from finetune.run.memory_plan import plan_memory

    monkeypatch.setattr("finetune.model.quantization.DEQUANTIZED_SHARE", 0.0)

    overrides = (f"model.name_or_path={experts}", f"quantization={quantization}")
    config = tiny(*overrides, "optimizer.learning_rate=1e-3", *SHORT)
    plan = plan_memory(config, SharedResources())
    weights = 2 * 4 * (2 * 32 * 64 + 32 * 64)
    assert plan.fullest.experts == (4 * weights if shown else 0)
    if quantization != "nf4":
        assert plan.fullest.base > 4 * weights  # in the base's figure too


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_plan_says_how_the_base_is_quantised(
    bases: dict[str, Path], tiny_base: Path, tmp_path: Path, base: str
) -> None:
    name = f"model.name_or_path={bases[base]}"
    overrides = [*tiny_overrides(tiny_base), name, "quantization=none"]
    command = [sys.executable, "-m", "finetune.plan", *overrides, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quantization"] == base
