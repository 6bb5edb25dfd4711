"""A model as lm-evaluation-harness asks it: texts to tokens, and the run's engine for the rest.

Imported only where a task is evaluated or planned, because it imports `lm_eval`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune.data.chat_template import ChatTemplate
from finetune.data.encoding import IGNORED
from finetune.data.token_file import Example
from finetune.engine.encoded_prompts import (
    Answers,
    EncodedPrompts,
    Sampling,
    StopTexts,
)
from finetune.engine.evaluation import Evaluation
from finetune.metrics.harness_generation import (
    AnswerSettings,
    check_room,
    read_settings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**20
"""Tokens of a window of a text, where the base has no limit of positions."""


@dataclass(frozen=True)
class PromptFormat:
    """How the texts of a task become prompts, and how its answers end."""

    template: ChatTemplate | None
    """The chat template; None: prompts are plain text."""
    system: str | None
    """Text of a system turn before each prompt."""
    ends: list[int]
    """Ids that end an answer."""
    seed: int
    """Of sampled answers."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Tokenises the harness's requests, and asks for losses and answers.

    Args:
        path: The task, as `evaluation.metrics` names it.
        tokenizer: The base's tokenizer.
        prompt_format: How prompts are formatted.
        positions: Positions of the base; None: unlimited.
        evaluate_rows: Returns the evaluation of tokenised rows; None: requests are only built.
        answer: Returns the answers to prompts, those of each item; None: as above.
    """

    def __init__(
        self,
        path: str,
        tokenizer: "PreTrainedTokenizerBase",
        prompt_format: PromptFormat,
        positions: int | None,
        evaluate_rows: Callable[[list[Example]], Evaluation] | None = None,
        answer: Callable[[list[EncodedPrompts]], list[Answers]] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.cut_prompts = 0
        """Prompts whose beginnings were cut, because the base has too few positions."""
        self._path = path
        self._positions = positions or NO_LIMIT
        self._evaluate_rows = evaluate_rows
        self._answer = answer

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of built requests, which is not used."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat as the run renders its rows.

        Args:
            chat_history: The messages.
            add_generation_prompt: False: the last one is the beginning of the answer.
        """
        template = self.prompt_format.template
        assert template is not None
        if add_generation_prompt:
            return template.render(chat_history, ask=True)
        *messages, beginning = chat_history
        return template.render(messages, ask=True) + beginning["content"]

    @property
    def eot_token_id(self) -> int:
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        # The template has written all special tokens, as in the run's rows.
        if add_special_tokens is None and self.prompt_format.template is not None:
            add_special_tokens = False
        if add_special_tokens is None:
            return self._encode_text(string)
        ids: list[int] = self.tokenizer.encode(
            string, add_special_tokens=add_special_tokens
        )
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Encode plain text as the tokenizer does by default, with one beginning."""
        bos = self.tokenizer.bos_token
        special = {}
        if bos and text.startswith(bos):
            special = {"add_special_tokens": False}
        ids: list[int] = self.tokenizer.encode(text, **special)
        return ids

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, True)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, answer) for _, context, answer in requests]
        assert self._evaluate_rows is not None
        evaluation = self._evaluate_rows(rows)
        columns = zip(
            evaluation.row_losses,
            evaluation.row_tokens,
            evaluation.row_correct,
            strict=True,
        )
        return [(-loss, correct == tokens) for loss, tokens, correct in columns]

    def _row(self, context: list[int], answer: list[int]) -> Example:
        """Return a row whose loss is that of the answer; a context that is too long is cut."""
        ids = [*context, *answer]
        self.cut_prompts += len(ids) > self._positions
        labels = [IGNORED] * len(context) + answer
        return {
            "input_ids": ids[-self._positions :],
            "labels": labels[-self._positions :],
        }

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[float]:
        windows = []
        counts = []
        for request in requests:
            (text,) = request.args
            # A row has one token more than the window's answer.
            of_text = get_rolling_token_windows(
                token_list=self._encode_text(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._positions - 1,
                context_len=1,
            )
            disjoint = [(None, *make_disjoint_window(window)) for window in of_text]
            windows += disjoint
            counts.append(len(disjoint))
        likelihoods = iter(self._loglikelihood_tokens(windows))
        return [sum(next(likelihoods)[0] for _ in range(count)) for count in counts]

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[str]:
        groups: dict[AnswerSettings, list[int]] = {}
        for number, request in enumerate(requests):
            settings = read_settings(self._path, request.args[1])
            groups.setdefault(settings, []).append(number)
        prompts = []
        for settings, numbers in groups.items():
            texts = [requests[number].args[0] for number in numbers]
            prompts.append(self.encode_prompts(texts, settings))
        assert self._answer is not None
        answers = self._answer(prompts)
        texts = [""] * len(requests)
        for (settings, numbers), group_answers in zip(
            groups.items(), answers, strict=True
        ):
            for number, tokens in zip(numbers, group_answers, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(
                    str(text), list(settings.stops), None
                )
        return texts

    def encode_prompts(
        self, texts: list[str], settings: AnswerSettings
    ) -> EncodedPrompts:
        """Encode prompts; the beginning of one that is too long is cut.

        Raises:
            ConfigError: The limit of the answers leaves no room for a prompt.
        """
        check_room(self._path, settings, self._positions)
        room = self._positions - settings.max_tokens
        ids = [self.tok_encode(text) or [self.prefix_token_id] for text in texts]
        self.cut_prompts += sum(len(tokens) > room for tokens in ids)
        sampling = None
        if settings.temperature:
            seed = self.prompt_format.seed
            sampling = Sampling(settings.temperature, settings.top_p, seed)
        stops = None
        if settings.stops:
            stops = StopTexts(self.tokenizer, settings.stops)
        return EncodedPrompts(
            [tokens[-room:] for tokens in ids],
            [settings.max_tokens] * len(ids),
            self.prompt_format.ends,
            self.tokenizer.pad_token_id,
            sampling,
            stops,
        )
