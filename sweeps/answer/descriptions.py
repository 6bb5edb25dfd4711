"""The lines that describe an answer or a confirmation, on the terminal and in the report."""

from collections.abc import Mapping
from typing import Any


def test_loss_lines(answer: Mapping[str, Any]) -> list[str]:
    """Describe the test losses of the winner and the baseline.

    Args:
        answer: the content of `answer.json`.

    Returns:
        A line with the losses (nats per token), and one with their difference and its confidence
        interval if there is a baseline to compare with. Empty without test rows.
    """
    test = answer["test"]
    if test is None:
        return []
    loss = f"{test['winner']:.4f}"
    rows = f"on {test['rows']} test rows that no decision has used"
    if "difference" in test:
        difference = f"{test['difference']:+.4f}"
        interval = _format_interval(*test["interval_95"])
        return [
            f"{loss}, baseline {test['baseline']:.4f} {rows}",
            f"{difference}, {interval}: {test['verdict']}",
        ]
    if answer["baseline"] == answer["trial"]:
        return [f"{loss} {rows}: the winner is the baseline itself"]
    return [f"{loss} {rows}"]


def _format_interval(low: float, high: float) -> str:
    return f"95 % interval {low:+.4f} to {high:+.4f}"


def confirmation_lines(confirmation: Mapping[str, Any]) -> list[str]:
    """Describe a confirmation.

    Args:
        confirmation: the content of `confirm.json`.

    Returns:
        A line for each retrained trial, one for each comparison with the winner on the test rows,
        and one if the winner is another trial than before.
    """
    lines = []
    for candidate in confirmation["candidates"]:
        lines.append(_candidate_line(candidate, confirmation["objective"]))
    for comparison in confirmation["comparisons"]:
        lines.append(_comparison_line(comparison))
    if confirmation["winner"] != confirmation["before"]:
        lines.append(_winner_change(confirmation))
    return lines


def _candidate_line(candidate: Mapping[str, Any], objective: str) -> str:
    result = f"{objective}: no run completed"
    if candidate["mean"] is not None:
        result = f"{objective} {_format_mean(candidate)}"
    line = f"trial {candidate['trial']}: {result}"
    if candidate["role"]:
        line += f"  {candidate['role']}"
    failures = candidate["failed"]
    if failures:
        line += f"  {len(failures)} failed: {failures[0]}"
    return line


def _format_mean(candidate: Mapping[str, Any]) -> str:
    """Format the mean over a candidate's seeds, its standard deviation, and their number."""
    mean = f"{candidate['mean']:.4f}"
    if candidate["spread"] is not None:
        mean += f" ± {candidate['spread']:.4f}"
    count = len(candidate["values"])
    seeds = "1 other seed" if count == 1 else f"{count} other seeds"
    return f"{mean} with {seeds}"


def _comparison_line(comparison: Mapping[str, Any]) -> str:
    """Describe the winner's test loss minus another candidate's."""
    difference = f"{comparison['difference']:+.4f}"
    interval = _format_interval(comparison["low"], comparison["high"])
    probability = _format_probability(comparison["chance"])
    return (
        f"trial {comparison['trial']} compared with trial {comparison['other']}: "
        f"test loss {difference}, {interval} on {comparison['rows']} test rows; "
        f"better with a probability of {probability}"
    )


def _format_probability(share: float) -> str:
    """Format a share of resamples; never as 0 % or 100 %, which resamples cannot prove."""
    if share > 0.99:
        return "more than 99%"
    if share < 0.01:
        return "less than 1%"
    return f"{share:.0%}"


def _winner_change(confirmation: Mapping[str, Any]) -> str:
    """Say why the confirmed winner is not the study's best trial."""
    best = confirmation["before"]
    winner = confirmation["winner"]
    with_failures = set()
    for candidate in confirmation["candidates"]:
        if candidate["failed"]:
            with_failures.add(candidate["trial"])
    if best in with_failures:
        return f"trial {best}, the study's best, has failed runs: trial {winner} is the winner"
    return f"trial {winner} has a better mean than trial {best}, the study's best: it is the winner"
