"""The lines that describe an answer or a confirmation, on the terminal and in the report."""

from collections.abc import Mapping
from typing import Any

from finetune.config.sections.evaluation import is_task
from finetune.metrics.names import describe_metric


def final_comparison_lines(answer: Mapping[str, Any]) -> list[str]:
    """Describe how the winner and the baseline do on the test rows.

    Args:
        answer: the content of `answer.json`.

    Returns:
        A line with the values of the objective's own metric; if there is a baseline to compare
        with, one on the two adapters and one on their configs; and one if these rows have been
        looked at before. Empty without test rows.
    """
    test = answer["test"]
    if test is None:
        return []
    compared = test.get("objective", test)
    # An answer of an earlier version names no metric: it is the loss.
    name = compared.get("metric", "test/loss").removeprefix("test/")
    winner = f"{describe_metric(name)} {compared['winner']:.4f}"
    # An answer of an earlier version counts the rows of the loss only.
    count = compared.get("rows", test["rows"])
    kind = "documents of the benchmark" if is_task(name) else "test rows"
    rows = f"on {count} {kind} that no decision has used"
    if "difference" not in compared:
        is_baseline = answer["baseline"] == answer["trial"]
        note = ": the winner is the baseline itself" if is_baseline else ""
        return [f"{winner} {rows}{note}"]
    return [
        f"{winner}, baseline {compared['baseline']:.4f} {rows}",
        _comparison("adapter", compared),
        _config_comparison(test.get("config")),
        *_look_lines(test.get("looks", 1)),
    ]


VERDICTS = {
    "better": "this {} is better than the baseline's",
    "worse": "this {} is worse than the baseline's",
    "no clear difference": "no clear difference between this {} and the baseline's",
    "too few rows to say": "too few rows to compare this {} with the baseline's",
    "one number for all rows": "without scores of rows, no interval for this {} and the baseline's",
}


def _comparison(noun: str, entry: Mapping[str, Any]) -> str:
    """Say what a comparison is of (adapter or config), its verdict, difference and interval."""
    line = f"{VERDICTS[entry['verdict']].format(noun)}: {entry['difference']:+.4f}"
    if entry["interval_95"] is not None:
        line += f", {_format_interval(*entry['interval_95'])}"
    return line


def _config_comparison(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "whether this config is better needs further seeds (confirm trains them)"
    return f"{_comparison('config', entry)}, with {entry['seeds']} seeds of {entry['seeds_of']}"


def _look_lines(looks: int) -> list[str]:
    if looks < 2:
        return []
    return [
        f"{looks} winners have been evaluated on these rows; the best of them is partly luck"
    ]


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
    objective = describe_metric(objective)
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
    """Describe the winner's value on the test rows minus another candidate's."""
    metric = comparison.get("metric", "test/loss")
    name = describe_metric(metric).replace("/", " ")
    line = (
        f"trial {comparison['trial']} compared with trial {comparison['other']}: "
        f"{name} {comparison['difference']:+.4f}"
    )
    if comparison["low"] is None:
        return f"{line}, {comparison['verdict']}"
    interval = _format_interval(comparison["low"], comparison["high"])
    line += f", {interval} on {comparison['rows']} test rows"
    # A confirmation of an earlier version has none.
    if comparison.get("confidence") is None:
        return line
    return f"{line}; better with a confidence of {_format_confidence(comparison['confidence'])}"


def _format_confidence(share: float) -> str:
    """Format a one-sided confidence; never as 0 % or 100 %, which no sample can prove."""
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
