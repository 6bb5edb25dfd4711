"""Rows and templates whose texts trackers must not have."""

from pathlib import Path

from support.runs import write_jsonl


def texts_of_user(folder: Path) -> tuple[list[str], str]:
    """Write rows; return the overrides of a run with texts, and what all of these texts hold."""
    secret = "quetzal"
    rows = [
        {"title": f"{secret} {number}", "reply": f"{secret}!"} for number in range(30)
    ]
    data = write_jsonl(folder / "rows.jsonl", rows)
    overrides = [
        f"dataset.path={data}",
        f"dataset.template='Is {{{{title}}}} a {secret}?'",
        "+dataset.columns.completion=reply",
        f"model.chat_template='{{{{messages[0].content}}}} {secret}: {{{{messages[-1].content}}}}'",
    ]
    return overrides, secret
