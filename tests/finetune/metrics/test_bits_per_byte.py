"""The loss by bytes of answer text."""

import math
from typing import Any

import pytest
from support.configs import compose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.errors import ConfigError
from finetune.metrics.bits_per_byte import bits_per_byte

TEXTS = ["The sum of two numbers.", "É ist größer, 数", " x = 1\n  return x", "a"]


def byte_level_tokenizer(size: int) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def test_the_same_likelihood_of_a_text_has_the_same_value_whatever_its_tokens() -> None:
    values = []
    lengths = []
    for size in (257, 300):
        tokenizer = byte_level_tokenizer(size)
        rows = []
        for text in TEXTS:
            prompt = tokenizer("Prompt: ")["input_ids"]
            answer = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            rows.append({"labels": [-100] * len(prompt) + answer})
            lengths.append(len(answer))
        # Two bits for each byte.
        losses = [2 * math.log(2) * len(text.encode()) for text in TEXTS]
        score = bits_per_byte(losses, rows, tokenizer)
        assert score.row_counts == tuple(len(text.encode()) for text in TEXTS)
        assert not score.higher_is_better
        values.append(score.value)
    assert values == pytest.approx([2.0, 2.0])
    assert lengths[: len(TEXTS)] != lengths[len(TEXTS) :]


def test_it_can_be_the_objective_and_no_functions_score_has_its_name() -> None:
    assert compose("objective=eval/bits_per_byte").objectives == ["eval/bits_per_byte"]
    with pytest.raises(ConfigError, match="eval/bits_per_byte would have two meanings"):
        compose("evaluation.metrics=[my_module.bits_per_byte]")
