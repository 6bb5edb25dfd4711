"""Counts and durations in texts for the user."""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: `1 point`, `1,200 points`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that suits it: `0 s`, `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        # What takes any time at all is not shown as none.
        return f"{max(1, round(seconds)) if seconds > 0 else 0} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
