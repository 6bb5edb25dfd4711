"""A model as lm-evaluation-harness asks it: texts to tokens, likelihoods from the run's engine.

Imported only where a task is evaluated, because it imports `lm_eval`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from finetune.compat import silence_harness
from finetune.data.encoding import IGNORED
from finetune.data.token_file import Example
from finetune.engine.evaluation import Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 2**20
"""Tokens of a window of a text, where the base has no limit of positions."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Tokenises the harness's requests, and asks for the losses of their rows.

    Args:
        tokenizer: The base's tokenizer.
        positions: Positions of the base; None: unlimited.
        ask: Returns the evaluation of tokenised rows.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        positions: int | None,
        ask: Callable[[list[Example]], Evaluation],
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._positions = positions or NO_LIMIT
        self._ask = ask

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
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        # Else as the tokenizer does by default.
        special = {}
        if add_special_tokens is not None:
            special = {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **special)
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
        evaluation = self._ask(rows)
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
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._positions - 1,
                context_len=1,
            )
            disjoint = [(None, *make_disjoint_window(window)) for window in of_text]
            windows += disjoint
            counts.append(len(disjoint))
        likelihoods = iter(self._loglikelihood_tokens(windows))
        return [sum(next(likelihoods)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        raise NotImplementedError("tasks that generate are refused with the config")


def evaluate_by_harness(
    model: HarnessModel, task: Any, numbers: list[int]
) -> Mapping[str, Any]:
    """Let the harness evaluate documents of a task.

    Args:
        model: Answers the harness's requests.
        task: The task; its requests are replaced.
        numbers: The documents, by their numbers.

    Returns:
        `values`, the task's metrics, and `samples`, those of each document.
    """
    silence_harness()
    name = task.task_name
    results = evaluate(
        model, {"tasks": {name: task}}, samples={name: numbers}, bootstrap_iters=0
    )
    return {"values": results["results"][name], "samples": results["samples"][name]}
