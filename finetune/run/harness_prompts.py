"""How the documents of lm-evaluation-harness's tasks become prompts, checked and counted.

Neither needs the weights of the base.
"""

from typing import TYPE_CHECKING, Literal

from finetune.config.schema import RunConfig
from finetune.data.encoding import Encoder
from finetune.errors import refusal
from finetune.metrics.harness_generation import check_room
from finetune.metrics.load import load_benchmarks
from finetune.model.architectures import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from finetune.run.harness_model import PromptFormat

Documents = Literal["eval", "test", "all"]
"""Documents with an even number are evaluated during training, the others at the end."""


def document_numbers(count: int, documents: Documents, limit: int | None) -> list[int]:
    """Return the numbers of a task's documents.

    Args:
        count: All of them.
        documents: Which ones.
        limit: `evaluation.limit`.
    """
    first, step = {"eval": (0, 2), "test": (1, 2), "all": (0, 1)}[documents]
    return list(range(first, count, step))[:limit]


def prompt_format(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase"
) -> "PromptFormat":
    """Return how prompts are formatted: as the run's rows, unless the config says otherwise.

    Answers end as those of the rows, or without a chat template at the tokenizer's end.
    """
    from finetune.run.harness_model import PromptFormat

    settings = config.evaluation
    template = None
    end = tokenizer.eos_token_id
    ends = [] if end is None else [int(end)]
    if settings.harness_chat_template is not False:
        encoder = Encoder(tokenizer, config.model.template_kwargs)
        template = encoder.template
        if template is not None:
            ends = encoder.ends
    seed = config.dataset.split_seed
    return PromptFormat(template, settings.harness_system, ends, seed)


def check_tasks(
    config: RunConfig,
    tokenizer: "PreTrainedTokenizerBase",
    base_config: "PreTrainedConfig",
) -> None:
    """Refuse tasks that do not suit the base.

    Args:
        config: The run's config.
        tokenizer: The base's tokenizer.
        base_config: The base's own config.

    Raises:
        ConfigError: A chat template is asked for, and there is none; or answers are longer than
            the base's positions.
    """
    settings = config.evaluation
    if settings.harness_chat_template is True and tokenizer.chat_template is None:
        base = config.model.name_or_path
        reason = f"{base} has no chat template; allowed: auto, false"
        raise refusal("evaluation.harness_chat_template", True, reason)
    positions = getattr(text_config_of(base_config), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return
    for benchmark in load_benchmarks(settings):
        for answers in benchmark.answer_settings:
            check_room(benchmark.path, answers, positions)
