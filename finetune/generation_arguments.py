"""Checks of what `finetune.generate` takes, from the command line and from Python."""

from collections.abc import Callable

from finetune.errors import refusal


def check_sampling(
    temperature: float,
    top_p: float | None,
    seed: int | None,
    key: Callable[[str], str] = str,
) -> None:
    """Refuse a temperature, a share or a seed that is not allowed.

    Args:
        temperature: 0: each token is the most likely one.
        top_p: the share of the likeliest tokens; None: all.
        seed: the seed; None: the run's.
        key: returns how errors write the name of one of them.
    """
    if not (_is_number(temperature) and 0 <= temperature < float("inf")):
        reason = "must be a number, at least 0"
        raise refusal(key("temperature"), temperature, reason)
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise refusal(key("top_p"), top_p, "must be above 0 and at most 1")
    if seed is not None and not (_is_whole(seed) and seed >= 0):
        raise refusal(key("seed"), seed, "must be a whole number, at least 0")
    for name, value in (("top_p", top_p), ("seed", seed)):
        if value is not None and temperature == 0:
            raise refusal(key(name), value, f"needs {key('temperature')} above 0")


def require_positive(key: str, limit: int | None) -> None:
    """Refuse a limit below 1.

    Args:
        key: the name of the limit, for the error.
        limit: the limit; None: there is none.
    """
    if limit is not None and not (_is_whole(limit) and limit >= 1):
        raise refusal(key, limit, "must be a whole number, at least 1")


def require_text(key: str, text: str) -> None:
    """Refuse a prompt or a system turn that is no text, is empty, or can't be written as UTF-8.

    Args:
        key: the name of the argument, for the error.
        text: its value.
    """
    if not isinstance(text, str) or not text.strip():
        raise refusal(key, text, "must be a text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair: what Python makes of an argument's byte that is no UTF-8.
        shown = text.encode(errors="backslashreplace").decode()
        raise refusal(key, shown, "must be valid UTF-8 text") from None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or _is_whole(value)
