"""Ollama's Modelfile for a GGUF file."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.chat_template import ChatTemplate
from finetune.model.gguf.go_template import PLAIN, chat_frame
from finetune.model.gguf.vocabulary import file_adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUOTES = '"""'
"""What Ollama's parser reads as the ends of a text of several lines."""


def modelfile(
    file_name: str,
    tokenizer: "PreTrainedTokenizerBase",
    ends: Sequence[int],
    variables: Mapping[str, Any],
) -> str:
    """Return the Modelfile of a model.

    Args:
        file_name: The GGUF file, beside the Modelfile.
        tokenizer: The model's tokenizer, with its chat template.
        ends: Ids of the tokens that end an answer.
        variables: Variables of the chat template (`model.template_kwargs`).
    """
    lines = [f"FROM ./{file_name}"]
    template = go_template(tokenizer, variables)
    if template is None:
        lines += _without_template(variables)
    else:
        lines.append(f"TEMPLATE {QUOTES}{template}{QUOTES}")
    for end in ends:
        token = tokenizer.convert_ids_to_tokens(end)
        lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def go_template(
    tokenizer: "PreTrainedTokenizerBase", variables: Mapping[str, Any]
) -> str | None:
    """Return the chat template in Ollama's language; None: it has no form there that is the same.

    Args:
        tokenizer: The model's tokenizer.
        variables: Variables of the chat template.
    """
    if tokenizer.chat_template is None:
        return PLAIN
    frame = chat_frame(
        ChatTemplate(tokenizer, variables),
        str(tokenizer.bos_token) if file_adds_bos(tokenizer, variables) else None,
    )
    text = None if frame is None else frame.to_go()
    return None if text is None or QUOTES in text else text


def _without_template(variables: Mapping[str, Any]) -> list[str]:
    """Return comments on a Modelfile without TEMPLATE."""
    lines = [
        "# Without TEMPLATE, Ollama renders chats by the template in the GGUF file; versions that",
        "# can't (before llama-server was their engine) take the most similar one that they have.",
    ]
    if variables:
        lines.append(
            f"# Its variables in training: {json.dumps(dict(variables), ensure_ascii=False)}"
        )
    return lines


def ollama_name(name: str) -> str:
    """Return a name that Ollama accepts, like the one given."""
    name = name.lower()
    allowed = [
        letter if letter.isascii() and letter.isalnum() else "-" for letter in name
    ]
    return "".join(allowed).strip("-") or "model"
