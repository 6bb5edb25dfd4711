"""Text from a run's adapter: `python -m finetune.generate RUN --prompt "…"`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.cli import command_parser, run_command
from finetune.config import QuantizationSettings, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_length: int,
    quantization: QuantizationSettings,
) -> list[str]:
    """Answers to prompts, each token the likeliest (greedy), at most `max_length` tokens of prompt and answer.

    A prompt is a user's turn if the tokenizer has a chat template, else text to go on with. One batch for
    all; the model's mode is left as it was.
    """
    import torch

    from finetune.base import autocast
    from finetune.evaluation import evaluating
    from finetune.tokens import render_chat

    if tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [render_chat(tokenizer, chat, ask=True) for chat in chats]
    else:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    # Padding stands on the left here: what is generated follows each prompt's last token.
    longest = max(len(prompt) for prompt in ids)
    filled = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in ids])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids])
    device = next(model.parameters()).device
    with evaluating(model), autocast(quantization):
        written = model.generate(
            input_ids=filled.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(1, max_length - min(len(prompt) for prompt in ids)),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_end_tokens(model, tokenizer),
        )
    answers = [row[longest:][: max(1, max_length - len(prompt))] for row, prompt in zip(written, ids, strict=True)]
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in answers]


def _end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What ends an answer: the tokenizer's end token and those that the model itself names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(token for token in ends if token is not None)


def main() -> None:
    """Read the command line, load the run, print the answers."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--prompt", required=True, action="append", help="may be given several times")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer together (the run's own)")
    parser.add_argument("--base", action="store_true", help="answer by the base, without the adapter")
    arguments = parser.parse_args()
    if arguments.max_length is not None and arguments.max_length < 1:
        raise refusal("--max-length", arguments.max_length, "must be at least 1")
    from finetune.trained import load_run

    trained = load_run(arguments.run)
    length = arguments.max_length or trained.config.sample_max_length
    model = trained.base if arguments.base else trained.with_adapter()
    for text in answer(model, trained.tokenizer, arguments.prompt, length, trained.config.quantization):
        print(text)


if __name__ == "__main__":
    run_command(main)
