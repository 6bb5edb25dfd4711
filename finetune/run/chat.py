"""A chat with a run's model on the terminal: each answer appears as it is generated."""

import dataclasses
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.types import Messages, Prompt
from finetune.engine.encoded_prompts import Sampling
from finetune.engine.generation import generate_answers
from finetune.engine.text_stream import TextStream
from finetune.run.load import TrainedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW = "/new"
"""Begins another chat."""

HELP = f"Ctrl-D ends the chat, Ctrl-C an answer; {NEW} begins another chat"

QUESTION = "> "


@dataclass
class Chat:
    """A chat and its messages so far."""

    run: TrainedRun
    model: "PreTrainedModel"
    system: str | None
    sampling: Sampling | None
    """None: each token is the most likely one."""
    max_new_tokens: int | None
    max_length: int | None
    messages: Messages = dataclasses.field(default_factory=list)

    def begin(self) -> None:
        """Forget all messages but the system turn."""
        self.messages.clear()
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})

    def answer(self, question: str, show: Callable[[str], None]) -> str:
        """Answer a question, and add both to the messages.

        Args:
            question: The user's message.
            show: Receives the answer's text piece by piece.

        Raises:
            KeyboardInterrupt: Ctrl-C; neither is added.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        stream = TextStream(self.run.tokenizer, show)
        sampling = self.sampling
        if sampling is not None:
            # Else each answer would be drawn with the same random numbers.
            seed = sampling.seed + len(messages)
            sampling = dataclasses.replace(sampling, seed=seed)
        (answer,) = generate_answers(
            self.model,
            self.run.tokenizer,
            [Prompt(question, messages=messages)],
            self.run.config.quantization,
            max_new_tokens=self.max_new_tokens,
            max_length=self.max_length,
            variables=self.run.config.model.template_kwargs,
            sampling=sampling,
            show_tokens=stream.add,
        )
        stream.finish(answer)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def chat_on_terminal(chat: Chat) -> None:
    """Ask for questions and answer them until the input ends."""
    chat.begin()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text must not end the chat.
        sys.stdin.reconfigure(errors="replace")
    print(HELP, file=sys.stderr)
    while True:
        try:
            question = input(QUESTION if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if question == NEW:
            chat.begin()
        elif question:
            _answer(chat, question)


def _answer(chat: Chat, question: str) -> None:
    def show(text: str) -> None:
        print(text, end="", flush=True)

    try:
        chat.answer(question, show)
    except KeyboardInterrupt:
        # Shown as far as it came. The next question follows the answer before it.
        print(" …", end="")
    print(flush=True)
