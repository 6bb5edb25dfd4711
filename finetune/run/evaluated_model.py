"""A run's model, as the evaluation of rows and of tasks needs it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from finetune.data.token_file import Example
from finetune.data.types import Prompt
from finetune.engine.encoded_prompts import Answers, EncodedPrompts, Sampling
from finetune.engine.evaluation import Evaluation
from finetune.engine.steps import RunSteps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvaluatedModel(Protocol):
    """What evaluates and generates: `PackedTraining`, `LoadedModel`."""

    model: Any
    """The base with the run's adapter."""

    def evaluate(
        self, rows: Sequence[Example], group_size: int | None = None
    ) -> RunSteps[Evaluation]:
        """Compute losses."""

    def generate_answers(
        self,
        prompts: Sequence[Prompt],
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int | None,
        max_length: int | None = None,
        sampling: Sampling | None = None,
    ) -> RunSteps[list[str]]:
        """Generate an answer to each prompt."""

    def answer(self, prompts: EncodedPrompts) -> RunSteps[Answers]:
        """Answer encoded prompts."""

    def wait(self, will_ask: bool) -> RunSteps[None]:
        """Let other runs work while a thread does; `will_ask`: answers are asked for next."""
