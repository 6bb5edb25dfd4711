"""What tests share: a tiny random base with a real tokenizer, configs composed as Hydra does, whole commands."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("WANDB_API_KEY", None)

from finetune.cli import CONF, quiet_libraries
from finetune.config import RunConfig

quiet_libraries()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, where runs repeat bit for bit, but for those marked gpu: pytest -m gpu."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokenised rows of tests stay out of the user's cache; the packaged model, fetched once, is looked for there."""
    os.environ.setdefault("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is served tokens that another one, or older code, has left."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand weights gain nothing by threads, and lose much where other work runs beside them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a byte-level BPE tokenizer with a ChatML template; pad is eos."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from finetune.python_docs import question_answer_pairs

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for row in question_answer_pairs() for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path_factory.mktemp("tiny") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compose(*overrides: str) -> RunConfig:
    """The checked config of a command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return RunConfig.from_hydra(hydra_compose("config", list(overrides)))


@pytest.fixture
def tiny(tiny_base: Path) -> Callable[..., RunConfig]:
    """Composes a config of seconds: the tiny base, few short rows, no tracker; further overrides win."""

    def make(*overrides: str) -> RunConfig:
        return compose(*tiny_overrides(tiny_base), *overrides)

    return make


def tiny_overrides(tiny_base: Path) -> list[str]:
    """The command line of a run of seconds."""
    return [
        f"model.name_or_path={tiny_base}",
        "tracker=none",
        "dataset.limit=24",
        "dataset.eval_fraction=0.02",
        "dataset.test_fraction=0.02",
        "sample_max_length=64",
        "trainer.logging_steps=1",
    ]


def run_cli(
    *arguments: str, cwd: Path, module: str = "finetune", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command as a user runs it: a process of its own."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
