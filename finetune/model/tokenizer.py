"""A base's tokenizer as runs use it, and as it is saved: with the base's own special tokens.

No torch is imported with this module.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from finetune.config.sections.model import ModelSettings
from finetune.data.chat_template import ChatTemplate
from finetune.errors import refusal
from finetune.model.base_config import explain_loading_errors, read_base_config
from finetune.model.source import BaseSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEFAULT = "default"
"""The name of the template that a tokenizer with several uses."""


@dataclass(frozen=True)
class _SpecialTokens:
    """What runs change in a tokenizer."""

    eos_token: str | None
    pad_token: str | None
    padding_side: str


# Weak, so that an entry ends with its tokenizer.
_of_base: "WeakKeyDictionary[PreTrainedTokenizerBase, _SpecialTokens]" = (
    WeakKeyDictionary()
)
"""The base's own values of each tokenizer that `set_special_tokens` has changed."""

_saved_files: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[str, bytes]]" = (
    WeakKeyDictionary()
)
"""The files of each tokenizer that has been saved, by their paths in its folder."""


def load_tokenizer(
    source: BaseSource, settings: ModelSettings
) -> "PreTrainedTokenizerBase":
    """Load the base's tokenizer, set to pad on the right with the end token.

    Raises:
        ConfigError: The tokenizer can't be loaded, or has no end token, or `model.chat_template`
            names none of its templates.
    """
    from transformers import AutoTokenizer

    with explain_loading_errors(settings):
        tokenizer = AutoTokenizer.from_pretrained(
            source.location,
            revision=source.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    # The template first, as it may say which token ends an answer.
    choose_template(tokenizer, settings)
    set_special_tokens(tokenizer, read_base_config(source, settings), settings)
    return tokenizer


def choose_template(
    tokenizer: "PreTrainedTokenizerBase", settings: ModelSettings
) -> None:
    """Give the tokenizer the chat template of `model.chat_template`.

    Raises:
        ConfigError: It names no template of the tokenizer, or is null although the tokenizer has
            several and no default.
    """
    templates = _templates(tokenizer)
    names = ", ".join(templates)
    value = settings.chat_template
    if value is None:
        if templates and DEFAULT not in templates:
            reason = f"the tokenizer has several and no default; allowed: {names}, or Jinja text"
            raise refusal("model.chat_template", value, reason)
        return
    if value in templates:
        tokenizer.chat_template = templates[value]
        return
    if not value.strip():
        raise refusal("model.chat_template", value, "must be Jinja text, or null")
    # One word without braces is meant as a name: as Jinja text it would say nothing of a chat.
    if "{" not in value and " " not in value.strip():
        allowed = f"{names}, or Jinja text" if names else "Jinja text, or null"
        reason = f"the tokenizer has no such template; allowed: {allowed}"
        raise refusal("model.chat_template", value, reason)
    tokenizer.chat_template = value


def _templates(tokenizer: "PreTrainedTokenizerBase") -> Mapping[str, str]:
    """The tokenizer's templates by name."""
    template = tokenizer.chat_template
    if template is None:
        return {}
    return template if isinstance(template, dict) else {DEFAULT: template}


def set_special_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    base: "PreTrainedConfig",
    settings: ModelSettings,
) -> None:
    """Set the tokenizer to pad on the right with the end token.

    An end token and padding are told apart by labels and attention masks, not by their ids. A
    tokenizer that names no end token gets the one of its chat template, or of the base's config.

    Args:
        tokenizer: The base's tokenizer, with its chat template chosen.
        base: The base's own config.
        settings: `model`.

    Raises:
        ConfigError: There is no end token.
    """
    _of_base[tokenizer] = _SpecialTokens(
        tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side
    )
    if tokenizer.eos_token is None:
        end = _end_of_template(tokenizer, settings) or _end_of_config(tokenizer, base)
        if end is None:
            reason = "its tokenizer has no end token"
            raise refusal("model.name_or_path", settings.name_or_path, reason)
        log.info("tokenizer: it names no end token; %s ends an answer", end)
        tokenizer.eos_token = end
    # Many bases have no token for padding, and a new one would have no embedding.
    tokenizer.pad_token = tokenizer.eos_token
    # For training; generation pads its prompts itself, on the left.
    tokenizer.padding_side = "right"


def _end_of_template(
    tokenizer: "PreTrainedTokenizerBase", settings: ModelSettings
) -> str | None:
    if tokenizer.chat_template is None:
        return None
    return ChatTemplate(tokenizer, settings.template_kwargs).end


def _end_of_config(
    tokenizer: "PreTrainedTokenizerBase", base: "PreTrainedConfig"
) -> str | None:
    text_config = base.get_text_config(decoder=True)
    ids: Any = getattr(text_config, "eos_token_id", None)
    # A tokenizer has one end token; a config may list several.
    first = ids[0] if isinstance(ids, list) and ids else ids
    if not isinstance(first, int):
        return None
    token = tokenizer.convert_ids_to_tokens(first)
    return token if isinstance(token, str) else None


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer with the base's own special tokens, not those that runs set.

    Args:
        tokenizer: As `load_tokenizer` returns it; it does not change afterwards.
        folder: Other files in it stay.
    """
    for name, content in _files_of(tokenizer).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _files_of(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bytes]:
    """Return the files of a saved tokenizer. Written anew for each trial, they take 30 ms."""
    if tokenizer not in _saved_files:
        with _special_tokens_of_base(tokenizer), TemporaryDirectory() as draft:
            tokenizer.save_pretrained(draft)
            _saved_files[tokenizer] = {
                str(path.relative_to(draft)): path.read_bytes()
                for path in Path(draft).rglob("*")
                if path.is_file()
            }
    return _saved_files[tokenizer]


@contextlib.contextmanager
def _special_tokens_of_base(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Give a tokenizer the base's own special tokens within the block."""
    original = _of_base.get(tokenizer)
    if original is None:
        yield
        return
    current = _SpecialTokens(
        tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side
    )
    _assign(tokenizer, original)
    try:
        yield
    finally:
        _assign(tokenizer, current)


def _assign(tokenizer: "PreTrainedTokenizerBase", values: _SpecialTokens) -> None:
    tokenizer.eos_token = values.eos_token
    tokenizer.pad_token = values.pad_token
    tokenizer.padding_side = values.padding_side
