"""What became of rows when they were tokenised: counts, and what a reader should know."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NO_ANSWER_WITHIN = "rows with no answer within dataset.max_length"
NOTHING_LEARNT = "rows of which no answer is learnt"
TOO_LONG = "rows longer than dataset.max_length"
REFUSED = "rows that can't be encoded (dataset.on_bad_row=skip)"

EXAMPLE_REASONS = {
    NO_ANSWER_WITHIN: "examples with no answer within dataset.max_length",
    TOO_LONG: "examples longer than dataset.max_length",
}
"""The reasons for one of several examples of a row."""

LISTED_ROWS = 3
"""How many skipped rows the log names."""


@dataclass
class TokenReport:
    """What became of rows when they were tokenised. Reports of chunks of rows can be added."""

    rows: int = 0
    """Rows that were given."""
    examples: int = 0
    """What a row becomes: a row can become several."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rows that became no example, by reason."""
    examples_left_out: Counter[str] = field(default_factory=Counter)
    """Examples that were left out of rows that have others, by reason."""
    cut: int = 0
    """Examples whose end is lost to `dataset.max_length`."""
    shortened: int = 0
    """Examples that lost their oldest turns, to leave room for their answer."""
    unlearnt: Counter[str] = field(default_factory=Counter)
    """Answers that are not learnt, by reason."""
    skipped: list[str] = field(default_factory=list)
    """The first rows that can't be encoded, and why, one line each."""
    notes: list[str] = field(default_factory=list)
    """What else a reader should know of the encoding, one line each."""

    chats: int = 0
    """Rows that are chats."""
    first_system: str | None = None
    """The place of the first row that has a system turn."""
    first_rendered: str | None = None
    """The place of the first row whose messages hold tokens that begin turns."""
    named_roles: list[str] = field(default_factory=list)
    """The roles, user and assistant, of which messages have a name."""
    message_keys: list[str] = field(default_factory=list)
    """Keys of messages that the common form does not know, in the order of the rows."""
    largest_id: int = -1
    """The largest token id."""

    def add(self, other: "TokenReport") -> None:
        """Add the report of the rows that follow."""
        self.rows += other.rows
        self.examples += other.examples
        self.left_out += other.left_out
        self.examples_left_out += other.examples_left_out
        self.cut += other.cut
        self.shortened += other.shortened
        self.unlearnt += other.unlearnt
        self.skipped = (self.skipped + other.skipped)[:LISTED_ROWS]
        self.chats += other.chats
        self.first_system = self.first_system or other.first_system
        self.first_rendered = self.first_rendered or other.first_rendered
        new_roles = [role for role in other.named_roles if role not in self.named_roles]
        self.named_roles = self.named_roles + new_roles
        new_keys = [key for key in other.message_keys if key not in self.message_keys]
        self.message_keys = self.message_keys + new_keys
        self.largest_id = max(self.largest_id, other.largest_id)

    def lines(self, split: str, max_length: int | None) -> list[str]:
        """Return what the log says, one line for each count."""
        lines = [f"skipped {line}" for line in self.skipped]
        for reason, count in self.left_out.items():
            lines.append(f"left out {count} {split} {reason}")
        for reason, count in self.examples_left_out.items():
            lines.append(f"left out {count} {split} {reason}")
        examples = self.examples + self.examples_left_out.total()
        has_several = examples > self.rows - self.left_out.total()
        unit = f"{split} {'examples' if has_several else 'rows'}"
        if self.cut:
            total = self.examples if has_several else self.rows
            limit = f"dataset.max_length={max_length}"
            lines.append(
                f"cut {self.cut} of {total} {unit} to {limit}: their end is lost"
            )
        if self.shortened:
            reason = "to keep the answer within dataset.max_length"
            lines.append(
                f"left out the oldest turns of {self.shortened} {unit}, {reason}"
            )
        for reason, count in self.unlearnt.items():
            lines.append(f"{split}: not learnt: {count} {reason}")
        if has_several:
            reason = (
                "the chat template renders an answer differently once other turns follow it, "
                "so each such answer is an example of its own"
            )
            counts = f"{self.examples} {split} examples of {self.rows} rows"
            lines.append(f"{counts}: {reason}")
        # Held-out rows are rendered by the same template.
        return lines + self.notes if split == "train" else lines

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return vars(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TokenReport":
        """Return the report that `to_dict` has made values of."""
        report = cls(**values)
        report.left_out = Counter(values["left_out"])
        report.examples_left_out = Counter(values["examples_left_out"])
        report.unlearnt = Counter(values["unlearnt"])
        return report
