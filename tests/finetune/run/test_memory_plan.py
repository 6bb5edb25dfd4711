"""The plan: what it prints, what it refuses, and that it tells the memory that a run then takes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from support.allocations import allocated
from support.commands import Station, run_cli
from support.configs import tiny_overrides
from support.documents import PAGE, described_keys
from support.models import wide_base

from finetune.config.schema import RunConfig
from finetune.model.memory import USABLE
from finetune.run.context import RunContext
from finetune.run.memory_plan import plan_memory, resolve_checkpointing
from finetune.run.resources import SharedResources
from finetune.run.run import run


def planned(output: str) -> float:
    """GiB of one run's peak."""
    found = re.search(r"peak of one run +([\d.]+) GiB", output)
    assert found
    return float(found[1])


def test_is_said_before_any_weights_load(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    for file in (
        tiny_base.iterdir()
    ):  # the weights' file is there and holds nothing that could be loaded
        (tmp_path / "base" / file.name).write_bytes(
            b"" if file.suffix == ".safetensors" else file.read_bytes()
        )
    done = station.run(
        *tiny_overrides(tmp_path / "base"), module="finetune.plan", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    names = (
        "base",
        "adapter and its gradient",
        "optimizer",
        "activations",
        "logits",
        "tokens",
        "each further slot",
    )
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in names), (
        done.stdout
    )
    assert 0.2 < planned(done.stdout) < 3


def test_json_is_all_that_stdout_holds(tiny_base: Path, tmp_path: Path) -> None:
    """transformers prints on stdout when its Trainer is imported under WANDB_MODE=offline."""
    overrides = [*tiny_overrides(tiny_base), "optimizer=adafactor"]
    planned = run_cli(
        *overrides,
        "trainer.engine=trl",
        "--json",
        cwd=tmp_path,
        module="finetune.plan",
        WANDB_MODE="offline",
    )
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["peak"] > 0
    assert "WANDB" in planned.stderr


def test_json_has_the_figures_of_the_table(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    overrides = [*tiny_overrides(tiny_base), "trainer.max_steps=2"]
    printed = station.run(*overrides, "--json", module="finetune.plan", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    figures = json.loads(printed.stdout)
    assert figures.keys() == described_keys("PLAN")
    assert [
        name for name in figures["memory"] if f"`{name}`" not in PAGE.read_text()
    ] == []
    table = station.run(*overrides, module="finetune.plan", cwd=tmp_path).stdout
    gib = {name: f"{size / 2**30:.2f} GiB" for name, size in figures["memory"].items()}
    for name, key in (
        ("base", "base"),
        ("adapter and its gradient", "adapter"),
        ("logits", "logits"),
    ):
        (line,) = (line for line in table.splitlines() if line.startswith(f"{name} "))
        assert line.endswith(gib[key])
    assert planned(table) == pytest.approx(figures["peak"] / 2**30, abs=0.05)
    assert figures["peak"] <= figures["available"]
    assert f" {figures['train_tokens']}: about " in table
    assert (
        f"room for {figures['largest_slots']}, {figures['slots']} recommended" in table
    )
    assert f"{figures['learning_rate']:8.2g}" in table
    assert figures["train_seconds"] > 0


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["lora.r=0"], "lora.r=0: "),
        (["nonsense=1"], "nonsense: no such key"),
        (
            ["trainer.per_device_train_batch_size=2000000", "trainer.max_steps=1"],
            "train_batch_size=2000000: the run needs",
        ),
    ],
)
def test_refuses_in_one_line(
    station: Station, tiny_base: Path, tmp_path: Path, overrides: list[str], named: str
) -> None:
    rows = "".join(
        json.dumps({"text": f"{n} " + "word " * 400}) + "\n" for n in range(300)
    )
    (tmp_path / "d.jsonl").write_text(rows)
    more = [
        "dataset.path=d.jsonl",
        "dataset.limit=300",
        "model.name_or_path=" + str(wide_base(tiny_base, tmp_path)),
    ]
    done = station.run(
        *tiny_overrides(tiny_base),
        *more,
        *overrides,
        module="finetune.plan",
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_activations_that_would_not_fit_are_computed_twice(
    tiny: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("finetune.run.planned_base._resident", lambda: 2**28)
    resources = SharedResources()
    config = tiny("trainer.max_steps=2")
    kept, saved = (
        plan_memory(
            tiny("trainer.max_steps=2", f"trainer.gradient_checkpointing={saving}"),
            resources,
        )
        for saving in ("false", "true")
    )
    assert saved.peak() < kept.peak()
    assert (
        resolve_checkpointing(
            config, "packed", resources
        ).trainer.gradient_checkpointing
        is False
    )

    between = (saved.peak() + kept.peak()) / 2 / USABLE
    monkeypatch.setattr(
        "finetune.run.memory_plan.available_memory", lambda gpus: int(between)
    )
    with caplog.at_level("INFO"):
        run(config, tmp_path, RunContext(resources=resources, interactive=False))

    assert (
        "trainer.gradient_checkpointing=partial: the activations would not fit otherwise"
        in caplog.messages
    )
    assert (
        resolve_checkpointing(
            config, "packed", resources
        ).trainer.gradient_checkpointing
        == "partial"
    )
    assert (
        resolve_checkpointing(config, "trl", resources).trainer.gradient_checkpointing
        is False
    )
    wanted = tiny("trainer.gradient_checkpointing=false")
    assert resolve_checkpointing(wanted, "packed", resources) == wanted

    # Where a plan leaves too little free either way, the one that may still fit is chosen.
    for available, chosen in ((saved.peak(), "partial"), (saved.peak() - 1, False)):
        monkeypatch.setattr(
            "finetune.run.memory_plan.available_memory",
            lambda gpus, size=available: size,
        )
        resolved = resolve_checkpointing(config, "packed", resources)
        assert resolved.trainer.gradient_checkpointing == chosen


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        ("Llama", "q_v"),
        ("Llama", "all_linear"),
        ("Gemma3Text", "all_linear"),
        ("Gemma3Text", "q_v"),
        ("Phi3", "all_linear"),
        ("Qwen3_5Text", "all_linear"),
        ("Gemma4Text", "all_linear"),
        ("Gemma4Text", "q_v"),
        # Without shared keys and values, and without per-layer inputs.
        ("Gemma4Text 31B", "all_linear"),
    ],
)
@pytest.mark.parametrize(
    ("saves", "slots", "more"),
    [
        (False, 1, 0),
        (True, 1, 0),
        # With memory for the activations of more blocks than have to keep them.
        ("partial", 1, 2),
        pytest.param(True, 2, 0, marks=pytest.mark.matrix),
    ],
)
def test_a_gpus_plan_is_what_its_decoder_allocates(
    tiny: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    target: str,
    saves: bool | Literal["partial"],
    slots: int,
    more: int,
) -> None:
    """Within 10 %. The memory of tensors on the CPU is counted; kernels, which allocate nothing,
    are not run."""
    import torch
    import transformers

    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.gpu import (
        adapted_gate,
        attention,
        cross_entropy,
        delta_rule,
        gated_norm,
        gated_product,
        lowrank,
        rms_norm,
        rotary,
        rotated_norm,
        short_convolution,
    )
    from finetune.engine.packed.gpu.decoder import Decoder
    from finetune.engine.packed.gpu.stored_blocks import _output_columns
    from finetune.engine.packed.requests import Evaluate, ForwardBackward
    from finetune.run.decoder_memory import StoredMemory
    from finetune.run.memory_costs import activation_elements, adapted_layers

    modules = (
        *(adapted_gate, attention, cross_entropy, delta_rule, gated_norm),
        *(gated_product, lowrank, rms_norm, rotary, rotated_norm),
        short_convolution,
    )
    for module in modules:
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    monkeypatch.setattr(
        "finetune.engine.packed.backend_probe.failure", lambda *_, **__: None
    )  # it computes
    shapes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 16 if slots > 1 else 4,
        "num_attention_heads": 8,
    }
    if architecture == "Qwen3_5Text":
        shapes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        shapes |= {"head_dim": 64, "num_key_value_heads": 8}
    if architecture == "Gemma3Text":
        shapes |= {"head_dim": 64, "num_key_value_heads": 8}
    if architecture.startswith("Gemma4Text"):
        layer_types = ["sliding_attention", "full_attention"]
        shapes |= {"layer_types": layer_types * (shapes["num_hidden_layers"] // 2)}
        shapes |= {"head_dim": 64, "global_head_dim": 128, "num_key_value_heads": 4}
    if architecture == "Gemma4Text":
        shapes |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}
        shapes |= {"hidden_size_per_layer_input": 64, "num_key_value_heads": 1}
        shapes |= {"vocab_size_per_layer_input": 300}
    elif architecture == "Gemma4Text 31B":
        shapes |= {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    make_config = getattr(transformers, f"{architecture.split()[0]}Config")
    base_config = make_config(vocab_size=300, pad_token_id=0, **shapes)
    base = transformers.AutoModelForCausalLM.from_config(base_config)
    config = tiny(
        "quantization=none",
        f"lora/target={target}",
        f"trainer.gradient_checkpointing={str(saves).lower()}",
    )
    bank = Bank(base, config, Decoder(base, saves))
    places = [bank.slots.create(config.lora, seed) for seed in range(slots)]
    targets = adapted_layers(places[0].model)
    elements = activation_elements(base.config, config, targets, slots)
    tokens = 4 * 300
    training = elements.stored + elements.passing
    if more:
        blocks = StoredMemory.read(base.config, config, targets, element_bytes=4)
        assert blocks is not None
        first = tokens * blocks.layer_bytes
        # Beside one that is stored anyway, and two for the backward pass.
        usable = (1 + 2 + more + 0.5) * first + blocks.weight_bytes
        usable += shapes["num_hidden_layers"] * tokens * blocks.input_bytes
        stored_blocks = "finetune.engine.packed.gpu.stored_blocks"
        available = int((usable + bank.backends.current._stored._logits) / USABLE)
        monkeypatch.setattr(f"{stored_blocks}.available_memory", lambda: available)
        # A CPU's is not looked at.
        widths = [_output_columns(layer) for layer in base.get_decoder().layers]
        measured = int(first * widths[0] / max(widths))
        monkeypatch.setattr(
            f"{stored_blocks}.allocated_memory", lambda device: measured
        )
        monkeypatch.setattr(
            "finetune.engine.packed.gpu.blocks.allocated_memory", lambda device: 0
        )
        planned_more = blocks.additional_bytes(slots, tokens, usable) // 4 // tokens
        assert planned_more > 0
        training += planned_more
    ids = torch.randint(0, 300, (4, 300)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    parts = [(slot, rows[number::slots]) for number, slot in enumerate(places)]
    work = {
        training: lambda: bank.forward_backward(
            [ForwardBackward(*part, 0.1, 1) for part in parts]
        ),
        elements.evaluating: lambda: bank.evaluate([Evaluate(*part) for part in parts]),
    }
    for planned, run_it in work.items():
        assert allocated(run_it) / 4 / tokens == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_a_gpus_logits_are_those_of_a_chunk(
    monkeypatch: pytest.MonkeyPatch, cap: float | None
) -> None:
    """As `test_a_gpus_plan_is_what_its_decoder_allocates`."""
    import torch
    from transformers import Gemma4TextConfig

    from finetune.engine.packed.gpu import cross_entropy
    from finetune.engine.packed.gpu.decoder import Decoder
    from finetune.engine.packed.losses import token_losses
    from finetune.model.architectures import logit_transform_of
    from finetune.run.memory_costs import logits_bytes

    monkeypatch.setattr(cross_entropy, "launch", lambda *_: None)
    shapes = Gemma4TextConfig(vocab_size=5000, final_logit_softcapping=cap)
    head = torch.nn.Linear(8, 5000, bias=False).requires_grad_(False)
    tokens = 2 * Decoder.logits_chunk
    hidden, weights = torch.randn(tokens, 8), torch.ones(tokens)
    targets = torch.zeros(tokens, dtype=torch.int64)
    transform = logit_transform_of(shapes)
    peak = allocated(
        lambda: token_losses(Decoder, head, transform, hidden, targets, weights)  # type: ignore[arg-type]
    )
    planned = logits_bytes(shapes, uses_decoder=True, half_precision=False)
    assert peak == pytest.approx(planned, rel=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.per_device_train_batch_size=12", "lora.r=64", "lora.dropout=0.1"],
    ],
)
def test_equals_the_measured_peak(tmp_path: Path, overrides: list[str]) -> None:
    """Within 15 % on a CPU, of a whole process on the packaged model."""
    both = [
        "tracker=none",
        "sample_prompts=[]",
        "trainer.max_steps=8",
        "trainer.eval_steps=4",
        *overrides,
    ]
    told = run_cli(*both, module="finetune.plan", cwd=tmp_path)
    done = run_cli(*both, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    measured = (
        json.loads((tmp_path / "run" / "result.json").read_text())["peak_memory_bytes"]
        / 2**30
    )
    assert planned(told.stdout) == pytest.approx(measured, rel=0.15)
