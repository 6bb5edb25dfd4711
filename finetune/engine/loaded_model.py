"""A model that no other run uses, evaluated by itself: TRL's, and that of a completed run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.data.token_file import Example
from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Sampling
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
        max_new_tokens: int | None,
        max_length: int | None = None,
        sampling: Sampling | None = None,
    ) -> RunSteps[list[str]]:
        """Generate an answer to each prompt.

        Arguments and answers are those of `finetune.engine.generation.generate_answers`.
        """
        yield from ()
        return generate_answers(
            self.model,
            tokenizer,
            prompts,
            self._config.quantization,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            variables=self._config.model.template_kwargs,
            sampling=sampling,
        )
