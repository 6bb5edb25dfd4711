"""A chat template in Ollama's language, Go's text/template, from a tokenizer's Jinja template.

It is not translated. The Jinja template writes a few chats, and what it puts between the messages
becomes the Go template, if that writes further chats in the same way.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.chat_template import ANSWER, QUESTION, SYSTEM, ChatTemplate
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.data.types import Messages

PLAIN = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
"""The template of a model that was trained without one: a question, and its answer after it."""


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around the messages of a chat."""

    before_question: str
    """Before the first question, where no system message precedes."""
    before_system: str
    after_system: str
    """Between the system message and the first question."""
    before_answer: str
    """Between a question and an answer that is given."""
    before_next_question: str
    """Between an answer and the next question."""
    asking: str
    """After the last question, where an answer shall follow."""

    def render(self, messages: "Messages") -> str:
        """Return a chat's text as the Go template writes it."""
        text = ""
        system = ""
        role = ""
        for message in messages:
            content = str(message["content"])
            if message["role"] == "system":
                system = content
                continue
            if message["role"] == "assistant":
                text += self.before_answer
            elif role:
                text += self.before_next_question
            elif system:
                text += self.before_system + system + self.after_system
            else:
                text += self.before_question
            text += content
            role = message["role"]
        return text + self.asking

    def to_go(self) -> str:
        """Return the template in Go's language."""
        return (
            '{{ $role := "" }}{{ range .Messages }}'
            '{{ if eq .Role "user" }}'
            f"{{{{ if $role }}}}{_literal(self.before_next_question)}"
            f"{{{{ else if $.System }}}}{_literal(self.before_system)}"
            f"{{{{ $.System }}}}{_literal(self.after_system)}"
            f"{{{{ else }}}}{_literal(self.before_question)}{{{{ end }}}}"
            "{{ .Content }}{{ $role = .Role }}"
            f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.before_answer)}'
            "{{ .Content }}{{ $role = .Role }}"
            "{{ end }}{{ end }}"
            f'{{{{ if eq $role "user" }}}}{_literal(self.asking)}{{{{ end }}}}'
        )


def _literal(text: str) -> str:
    """Return a text as Go's template language writes it."""
    return text.replace("{{", '{{ "{{" }}')


def chat_frame(template: ChatTemplate, beginning: str | None) -> ChatFrame | None:
    """Return what a chat template writes around messages.

    Args:
        template: The template with the variables of a run.
        beginning: The token that llama.cpp puts before every text by itself, so that the template
            need not; None: there is none.

    Returns:
        None: the template writes chats in another way than a frame can.
    """
    try:
        frame = _derive(template)
        if frame is None or not _is_faithful(frame, template):
            return None
    except ConfigError:
        return None
    if beginning is None:
        return frame
    return ChatFrame(
        frame.before_question.removeprefix(beginning),
        frame.before_system.removeprefix(beginning),
        frame.after_system,
        frame.before_answer,
        frame.before_next_question,
        frame.asking,
    )


def _derive(template: ChatTemplate) -> ChatFrame | None:
    """Read the frame off three chats."""
    question, answer = _message("user", QUESTION), _message("assistant", ANSWER)
    alone = template.render([question], ask=True).split(QUESTION)
    with_system = template.render([_message("system", SYSTEM), question], ask=True)
    longer = template.render([question, answer, question], ask=True)
    before_system, found, rest = with_system.partition(SYSTEM)
    after_system = rest.split(QUESTION)[0]
    before, _, last = longer.partition(ANSWER)
    if len(alone) != 2 or not found or last.count(QUESTION) != 1:
        return None
    return ChatFrame(
        before_question=alone[0],
        before_system=before_system,
        after_system=after_system,
        before_answer=before.rpartition(QUESTION)[2],
        before_next_question=last.partition(QUESTION)[0],
        asking=alone[1],
    )


def _is_faithful(frame: ChatFrame, template: ChatTemplate) -> bool:
    """Whether the frame writes further chats as the template does."""
    system = _message("system", "Be brief.\nBe kind.")
    chat = [
        _message("user", "What is a prime?"),
        _message("assistant", "A number with two divisors.\n\nTwo is one."),
        _message("user", "Is 91?"),
        _message("assistant", "No: 7 times 13."),
        _message("user", "And 97?"),
    ]
    chats = [[*start, *chat[:count]] for start in ([], [system]) for count in (1, 3, 5)]
    return all(frame.render(each) == template.render(each, ask=True) for each in chats)


def _message(role: str, content: str) -> "dict[str, object]":
    return {"role": role, "content": content}
