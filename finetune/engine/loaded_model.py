"""A model that no other run uses, evaluated by itself: TRL's, and that of a completed run."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.data.token_file import Example
from finetune.data.types import Prompt
from finetune.engine.evaluation import Evaluation, evaluate
from finetune.engine.generation import generate_answers
from finetune.engine.steps import RunSteps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LoadedModel:
    """Evaluates a model, and generates answers with it.

    Its methods are those of `PackedTraining`: generators, here without requests.

    Args:
        config: The run's config.
        model: A base, or a base with an adapter.
    """

    def __init__(self, config: RunConfig, model: "PreTrainedModel") -> None:
        self.model = model
        self._config = config

    def evaluate(self, rows: Sequence[Example]) -> RunSteps[Evaluation]:
        """Compute the model's losses on rows.

        Args:
            rows: Tokenised rows.

        Returns:
            The evaluation, with the rows in their order.
        """
        yield from ()
        batch_size = self._config.trainer.per_device_eval_batch_size
        return evaluate(self.model, rows, batch_size, self._config.quantization)

    def generate_answers(
        self,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int,
    ) -> RunSteps[list[str]]:
        """Generate an answer to each prompt.

        Args:
            prompts: The prompts.
            tokenizer: The base's tokenizer.
            max_new_tokens: Limit of an answer, in tokens.

        Returns:
            The answers, in the order of the prompts.
        """
        yield from ()
        answers: list[str] = []
        batch_size = self._config.trainer.per_device_eval_batch_size
        for start in range(0, len(prompts), batch_size):
            answers += generate_answers(
                self.model,
                tokenizer,
                prompts[start : start + batch_size],
                self._config.quantization,
                max_new_tokens=max_new_tokens,
                max_length=None,
                variables=self._config.model.template_kwargs,
            )
        return answers

    def generation_model(self) -> "AbstractContextManager[PreTrainedModel]":
        """Return the model, for text generation."""
        return nullcontext(self.model)
