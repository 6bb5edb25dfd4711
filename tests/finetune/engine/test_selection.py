"""The choice between the packed engine and TRL, and the reason that is logged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import Station
from support.configs import study_overrides, tiny_overrides
from support.runs import NONE, Tiny, final

from finetune.errors import ConfigError

UNSUPPORTED = {
    "lora.bias=all": ("lora.bias=all",),
    "lora.init_lora_weights=pissa": ("lora.init_lora_weights=pissa", NONE),
    "lora.extra={'lora_bias': True}": ("+lora.extra.lora_bias=true",),
    "lora.target_modules=['lm_head', 'q_proj'] (with the head)": (
        "lora.target_modules=[lm_head,q_proj]",
    ),
    "lora.target_modules=.*(head|q_proj) (with the head)": (
        "lora.target_modules='.*(head|q_proj)'",
    ),
    "trainer.extra={'label_smoothing_factor': 0.1}": (
        "+trainer.extra.label_smoothing_factor=0.1",
    ),
    "model.attn_implementation=eager": ("model.attn_implementation=eager",),
    "model.extra={'num_hidden_layers': 1}": ("+model.extra.num_hidden_layers=1",),
    "quantization.bnb_4bit_compute_dtype=float16": (
        "quantization.bnb_4bit_compute_dtype=float16",
    ),
    "model.dtype=bfloat16": ("model.dtype=bfloat16", NONE),
}


@pytest.mark.parametrize(
    ("reason", "overrides"), UNSUPPORTED.items(), ids=list(UNSUPPORTED)
)
def test_what_is_not_for_the_packed_engine_is_trls_and_said(
    reason: str,
    overrides: tuple[str, ...],
    tiny: Tiny,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    source = find_base(tiny().model)
    with caplog.at_level("INFO"):
        assert choose_engine(tiny(*overrides, "trainer.engine=trl"), source) == "trl"
        assert caplog.messages == []
        assert choose_engine(tiny(*overrides, "trainer.engine=auto"), source) == "trl"
    (line,) = caplog.messages
    assert line.startswith(f"engine: trl, as packed does not do {reason}")
    with pytest.raises(ConfigError) as refused:
        choose_engine(tiny(*overrides, "trainer.engine=packed"), source)
    assert str(refused.value).startswith(f"trainer.engine=packed: does not do {reason}")
    assert str(refused.value).endswith("; allowed: auto, trl")


@pytest.mark.parametrize("engine", ["auto", "packed", "trl"])
def test_what_neither_engine_does_is_refused(engine: str, tiny: Tiny) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    config = tiny("lora.use_dora=true", "quantization=int8", f"trainer.engine={engine}")
    with pytest.raises(ConfigError) as refused:
        choose_engine(config, find_base(config.model))
    key = "trainer.engine=packed" if engine == "packed" else "lora.use_dora=true"
    assert str(refused.value).startswith(f"{key}: does not ")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (NONE,),
        ("quantization=int8",),
        ("optimizer=paged_adamw_32bit",),
        ("optimizer=adamw_8bit",),
        ("optimizer=lion",),
        ("optimizer.name=sgd", "+trainer.extra.optim_args='momentum=0.9'"),
        ("optimizer.lora_plus_ratio=16",),
        ("lora.bias=lora_only",),
        ("lora.use_dora=true",),
        ("dataset.packing=true",),
        ("+trainer.extra.neftune_noise_alpha=5",),
        ("+lora.extra.rank_pattern={q_proj:4}", "+lora.extra.exclude_modules=[o_proj]"),
        ("lora.init_lora_weights=gaussian",),
        ("lora.target_modules=.*_proj",),
        ("+trainer.extra.save_total_limit=2",),
        ("model.attn_implementation=sdpa",),
        ("model.dtype=float32", NONE),
        ("+model.extra.attention_dropout=0.0",),
    ],
    ids=str,
)
def test_what_is_for_the_packed_engine_is_its_without_a_word(
    overrides: tuple[str, ...], tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    with caplog.at_level("INFO"):
        for engine in ("auto", "packed"):
            config = tiny(*overrides, f"trainer.engine={engine}")
            assert choose_engine(config, find_base(config.model)) == "packed"
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"attention_dropout": 0.1},
            "(of type llama: with attention_dropout=0.1; "
            "+model.extra.attention_dropout=0 trains packed without dropout)",
        ),
        (
            {
                "max_position_embeddings": 16,
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 10000.0,
                    "factor": 2.0,
                },
            },
            "(of type llama: beyond 16 tokens a row changes the positions of those beside it)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_base_of_another_kind_is_trls(
    change: dict[str, Any], reason: str, tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | change))
    config = tiny(f"model.name_or_path={folder}")
    assert choose_engine(config, find_base(config.model)) == "trl"
    refused = tiny(f"model.name_or_path={folder}", "trainer.engine=packed")
    with pytest.raises(ConfigError) as error:
        choose_engine(refused, find_base(refused.model))
    assert reason in str(error.value)


def test_remote_code_is_trls(tiny: Tiny, tiny_base: Path, tmp_path: Path) -> None:
    """A base of a known type whose files bring code of their own, which the config allows."""
    from transformers import AutoConfig

    from finetune.engine.selection import reason_unsupported

    base = AutoConfig.from_pretrained(tiny_base)
    base.auto_map = {"AutoModelForCausalLM": "modeling.Model"}
    assert reason_unsupported(tiny(), base) is None
    reason = reason_unsupported(tiny("model.trust_remote_code=true"), base)
    assert reason is not None
    assert reason.endswith("(of type llama: remote code)")


def test_a_base_of_no_known_type_is_packed_where_it_passes_the_check(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"model_type": "gemma2"}))
    config = tiny(f"model.name_or_path={folder}", "trainer.engine=packed")
    assert choose_engine(config, find_base(config.model)) == "packed"


ALL = "lora.bias=all (only those of layers with an adapter: lora_only)"
BIASES = ("lora.bias=all", "trainer.max_steps=1", "sample_prompts=[]")


def test_a_command_refuses_the_engine_before_the_base_is_loaded(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    asked = station.run(
        *tiny_overrides(tiny_base), *BIASES, "trainer.engine=packed", cwd=tmp_path
    )
    assert asked.returncode == 1
    (line,) = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
    assert (
        line == f"error: trainer.engine=packed: does not do {ALL}; allowed: auto, trl"
    )
    assert "no GPU" not in asked.stderr


def test_a_study_refuses_the_engine_before_it_begins(
    station: Station, tiny_base: Path, tmp_path: Path
) -> None:
    asked = station.run(
        *study_overrides(tiny_base, "s"), *BIASES, "trainer.engine=packed", cwd=tmp_path
    )
    assert asked.returncode == 1
    (line,) = [line for line in asked.stderr.splitlines() if line.startswith("error: ")]
    assert (
        line == f"error: trainer.engine=packed: does not do {ALL}; allowed: auto, trl"
    )
    assert not list(tmp_path.rglob("study.journal"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((*BIASES, "hydra.sweeper.slots=3"), ALL),
        (("lora.bias=choice(all,none)",), ALL),
    ],
    ids=["all", "some"],
)
def test_a_study_has_one_engine_and_says_once_why_it_is_trl(
    overrides: tuple[str, ...],
    reason: str,
    station: Station,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    more = ("hydra.sweeper.n_trials=2", "dataset.limit=8")
    ended = station.run(
        *study_overrides(tiny_base, "s"), *more, *overrides, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "engine" in line]
    assert said == [f"engine: trl, as packed does not do {reason}"]
    for number in range(2):
        result = final(tmp_path / "outputs/sweeps/s/trials" / str(number))
        assert (result["engine"], result["slots"], result["companions"]) == (
            "trl",
            1,
            [],
        )
