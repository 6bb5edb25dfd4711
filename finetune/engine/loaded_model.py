"""A model that no other run uses, evaluated by itself: TRL's, and that of a completed run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.config.schema import RunConfig
from finetune.data.token_file import Example
from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Answers, EncodedPrompts, Sampling
from finetune.engine.evaluation import Evaluation, evaluate, join_evaluations
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

    def evaluate(
        self, rows: Sequence[Example], group_size: int | None = None
    ) -> RunSteps[Evaluation]:
        """Compute the model's losses on rows.

        Args:
            rows: Tokenised rows.
            group_size: The rows come in groups of so many, whose common beginning is computed once
                for each group; None: once for all rows.

        Returns:
            The evaluation, with the rows in their order.
        """
        yield from ()
        batch_size = self._config.trainer.per_device_eval_batch_size
        quantization = self._config.quantization
        if group_size is None:
            return evaluate(self.model, rows, batch_size, quantization)
        evaluations = []
        for first in range(0, len(rows), group_size):
            group = rows[first : first + group_size]
            evaluations.append(evaluate(self.model, group, batch_size, quantization))
        return join_evaluations(evaluations)

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

    def answer(self, prompts: EncodedPrompts) -> RunSteps[Answers]:
        """Answer encoded prompts."""
        from finetune.engine.decoding import generate_tokens

        yield from ()
        quantization = self._config.quantization
        (answers,) = generate_tokens(self.model, [prompts], quantization)
        return answers

    def wait(self, will_ask: bool) -> RunSteps[None]:
        """Wait a moment for a thread; no other run needs to know of it."""
        yield None
