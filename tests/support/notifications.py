"""A `notify.command` that writes what it is told into a file, and that file."""

from pathlib import Path

TELLS = (
    'echo "$FINETUNE_EVENT|$FINETUNE_NAME|$FINETUNE_MESSAGE|$FINETUNE_ANSWER" >> told'
)
COMMAND = f"notify.command=[sh,-c,'{TELLS}; echo thanks']"


def told(place: Path) -> list[list[str]]:
    """Return event, name, message and answer of each notification in a working directory."""
    path = place / "told"
    text = path.read_text() if path.exists() else ""
    return [line.split("|") for line in text.splitlines()]
