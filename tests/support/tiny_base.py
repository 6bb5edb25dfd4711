"""The base of most tests."""

from pathlib import Path

from support.models import CHATML


def make_tiny_base(folder: Path) -> Path:
    """Save a Llama of two layers with random weights and its tokenizer; return the folder."""
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
    bpe.train_from_iterator(
        (text for row in question_answer_pairs() for text in row.values()), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def give_biases(base: Path) -> None:
    """Replace the base by one of the same sizes whose attention has biases."""
    import torch
    from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

    llama = AutoConfig.from_pretrained(base)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
        "eos_token_id", "pad_token_id", "tie_word_embeddings",
    )  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2Config(**{name: getattr(llama, name) for name in names})
    Qwen2ForCausalLM(config).save_pretrained(base)
