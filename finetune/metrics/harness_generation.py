"""How a task of lm-evaluation-harness wants its answers generated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import refusal

KEY = "evaluation.metrics"

DEFAULT_TOKENS = 256
"""Limit of an answer where a task gives none, as lm-evaluation-harness has it."""

NAMES = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are generated."""

    stops: tuple[str, ...]
    """Texts that end an answer, and that are no part of it."""
    max_tokens: int
    temperature: float
    """0: each token is the most likely one."""
    top_p: float


def read_settings(path: str, values: Mapping[str, Any]) -> AnswerSettings:
    """Read a task's `generation_kwargs`.

    Args:
        path: As `evaluation.metrics` names the task.
        values: The arguments.

    Raises:
        ConfigError: One of them has no counterpart.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    # Under one name each, with lm-evaluation-harness's defaults.
    plain: dict[str, Any] = dict(
        normalize_gen_kwargs(dict(values), default_max_gen_toks=DEFAULT_TOKENS)
    )
    stops = tuple(str(text) for text in plain.pop("until") if text)
    max_tokens = plain.pop("max_gen_toks")
    is_sampled = plain.pop("do_sample")
    temperature = float(plain.pop("temperature", 0.0))
    top_p = float(plain.pop("top_p", 1.0))
    if plain.get("num_beams") == 1:
        del plain["num_beams"]
    for name, value in plain.items():
        reason = (
            f"its generation_kwargs have {name}={value}; allowed: {', '.join(NAMES)}"
        )
        raise refusal(KEY, path, reason)
    if is_sampled and temperature <= 0:
        reason = "its generation_kwargs have do_sample=true; needs temperature above 0"
        raise refusal(KEY, path, reason)
    if max_tokens < 1:
        reason = (
            f"its generation_kwargs have max_gen_toks={max_tokens}; must be at least 1"
        )
        raise refusal(KEY, path, reason)
    return AnswerSettings(
        stops,
        max_tokens,
        temperature if is_sampled else 0.0,
        top_p if is_sampled else 1.0,
    )


def check_room(path: str, settings: AnswerSettings, positions: int) -> None:
    """Refuse answers that leave no room for a prompt.

    Args:
        path: As `evaluation.metrics` names the task.
        settings: How the answers are generated.
        positions: Positions of the base.

    Raises:
        ConfigError: There is none.
    """
    if settings.max_tokens >= positions:
        reason = (
            f"its answers have up to {settings.max_tokens} tokens (max_gen_toks), and the base has "
            f"{positions} positions"
        )
        raise refusal(KEY, path, reason)
