"""Text generation from prompts.

Loads no torch when it is imported, because a command and `finetune.run.run` import it at their top.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.config.sections.model import QuantizationSettings
from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Sampling, decode_answers, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Prompt],
    quantization: QuantizationSettings,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    variables: Mapping[str, Any] | None = None,
    sampling: Sampling | None = None,
    show_tokens: Callable[[list[int]], None] | None = None,
) -> list[str]:
    """Generate an answer to each prompt.

    A prompt is a user's message if the tokenizer has a chat template, else text to continue. The
    model's mode is left as it was.

    Args:
        model: A base, or a base with an adapter.
        tokenizer: The base's tokenizer.
        prompts: The prompts, generated in one batch as far as memory, the model's positions and
            its handling of padding allow it.
        quantization: As the base was loaded.
        max_new_tokens: Limit on an answer's tokens; None: `max_length` alone is the limit.
        max_length: Limit on the tokens of a prompt and its answer together; None:
            `max_new_tokens` alone is the limit.
        variables: Variables of the chat template (`model.template_kwargs`).
        sampling: How tokens are drawn; None: each token is the most likely one.
        show_tokens: Receives the tokens of the only prompt's answer as they are generated.

    Returns:
        The answers, in the order of the prompts; empty where a limit leaves no token for one, which
        a warning says.
    """
    from finetune.engine.decoding import generate_tokens

    encoded = encode_prompts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        variables=variables,
        sampling=sampling,
    )
    (answers,) = generate_tokens(
        model, [encoded], quantization, show_tokens=show_tokens
    )
    return decode_answers(tokenizer, answers)
