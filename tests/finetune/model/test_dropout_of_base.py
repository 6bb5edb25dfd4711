"""Dropout of a base's own config: set to 0 by `model.extra`, in both engines; else TRL's."""

import logging
from pathlib import Path

import pytest
from support.models import with_tokenizer_of
from support.runs import Tiny, losses

from finetune.errors import ConfigError
from finetune.run.context import RunContext
from finetune.run.run import run

WITHOUT = ("+model.extra.attention_dropout=0", "+model.extra.residual_dropout=0")
ADVICE = f"{' '.join(WITHOUT)} trains packed without dropout"
SHORT = ("trainer.max_steps=3", "trainer.eval_steps=0", "sample_prompts=[]")


@pytest.fixture(scope="module")
def seed_oss(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override of a Seed-OSS base with the dropouts that its config has by default."""
    import torch
    from transformers import AutoConfig, SeedOssConfig, SeedOssForCausalLM

    llama = AutoConfig.from_pretrained(tiny_base)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    torch.manual_seed(0)
    config = SeedOssConfig(
        head_dim=16, **{name: getattr(llama, name) for name in names}
    )
    assert config.attention_dropout == config.residual_dropout == 0.1
    model = SeedOssForCausalLM(config)
    folder = tmp_path_factory.mktemp("seed_oss") / "base"
    return f"model.name_or_path={with_tokenizer_of(tiny_base, model, folder)}"


def test_the_engine_is_trl_and_the_line_says_how_it_becomes_packed(
    tiny: Tiny, seed_oss: str, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.engine.selection import choose_engine
    from finetune.model.source import find_base

    config = tiny(seed_oss)
    with caplog.at_level(logging.INFO):
        assert choose_engine(config, find_base(config.model)) == "trl"
        assert caplog.messages[-1].endswith(
            f"(of type seed_oss: with attention_dropout=0.1, residual_dropout=0.1; {ADVICE})"
        )
        one = tiny(seed_oss, WITHOUT[1])
        assert choose_engine(one, find_base(one.model)) == "trl"
    assert "; +model.extra.attention_dropout=0 trains packed" in caplog.messages[-1]
    both = tiny(seed_oss, *WITHOUT, "trainer.engine=packed")
    assert choose_engine(both, find_base(both.model)) == "packed"


def test_it_stands_beside_other_arguments(tiny: Tiny, seed_oss: str) -> None:
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny(seed_oss, WITHOUT[0], "+model.extra.use_cache=false")
    base = load_base(find_base(config.model), config)
    assert base.config.attention_dropout == 0
    assert base.config.residual_dropout == 0.1
    assert base.config.use_cache is False


def test_another_reason_is_said_without_the_advice(tiny: Tiny, tmp_path: Path) -> None:
    """GPT-2 has dropouts and layers that the packed engine does not adapt."""
    from transformers import GPT2Config

    from finetune.engine.selection import reason_unsupported

    base = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64)
    reason = reason_unsupported(tiny(), base)
    assert reason is not None
    assert "trains packed" not in reason
    assert "Conv1D" in reason


@pytest.mark.parametrize("quantization", ["none", "nf4_double"])
def test_both_engines_train_without_dropout(
    tiny: Tiny, seed_oss: str, tmp_path: Path, quantization: str
) -> None:
    for engine in ("packed", "trl"):
        words = (f"trainer.engine={engine}", f"quantization={quantization}")
        config = tiny(*SHORT, seed_oss, *WITHOUT, *words)
        run(config, tmp_path / engine, RunContext(interactive=False))
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "trl"), rel=1e-5
    )


def test_a_dropout_that_the_base_does_not_have_is_refused(
    tiny: Tiny, seed_oss: str
) -> None:
    from finetune.model.base_config import read_base_config
    from finetune.model.source import find_base

    model = tiny(seed_oss, "+model.extra.attn_pdrop=0.0").model
    with pytest.raises(ConfigError) as refused:
        read_base_config(find_base(model), model)
    assert str(refused.value) == (
        "model.extra.attn_pdrop=0.0: is not in the base's config"
    )
