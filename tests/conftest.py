"""What tests share: a tiny random base with a real tokenizer, configs composed as Hydra does, whole commands."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "offline"

os.environ["TOKENIZERS_PARALLELISM"] = "false"

os.environ.pop("WANDB_API_KEY", None)

from support.commands import Station
from support.configs import compose, tiny_overrides
from support.models import CHATML

from finetune.config.schema import RunConfig
from finetune.console import quiet_libraries

quiet_libraries()


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, where runs repeat bit for bit, but for those marked gpu: pytest -m gpu."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # the GPU's kernels run on the CPU; Triton reads it when it is imported


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests leave stays out of the user's folders; the packaged model, fetched once, is looked for there."""
    os.environ.setdefault("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    os.environ["WANDB_DATA_DIR"] = str(tmp_path_factory.mktemp("wandb"))  # copies of artifacts' files


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

    from finetune.data.python_docs import question_answer_pairs

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


@pytest.fixture
def tiny(tiny_base: Path) -> Callable[..., RunConfig]:
    """Composes a config of seconds: the tiny base, few short rows, no tracker; further overrides win."""

    def make(*overrides: str) -> RunConfig:
        return compose(*tiny_overrides(tiny_base), "optimizer.learning_rate=1e-3", *overrides)

    return make


@pytest.fixture(scope="session")
def station(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Iterator[Station]:
    """One for all tests of studies."""
    made = Station(tmp_path_factory.mktemp("station"))
    yield made
    made.close()
