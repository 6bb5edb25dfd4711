"""The preview of rows as text, for a terminal or a file."""

import io
import statistics
import sys
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from finetune.config.sections.dataset import DatasetSettings
from finetune.data.rows import SPLITS
from finetune.data.segments import Kind, Segment, segments_of
from finetune.quantities import counted
from finetune.run.preview import ExampleLength, Preview, ShownExample

MOST_BINS = 10
"""Bars of the histogram, but for one that holds all longer examples."""

OUTLIER = 3
"""A few rows are outliers if the range of lengths is as many times that of all others."""

LISTED = 3
"""How many of the longest and shortest rows are named."""

WIDTH = 78
"""Columns of the histogram and of lines that name places."""

TRAINED, CUT, SPECIAL = "bold green", "bright_black strike", "cyan"


def print_preview(preview: Preview, split: str, settings: DatasetSettings) -> None:
    """Print a preview.

    With colours in a terminal; where there are none, brackets mark what is trained and cut.

    Args:
        preview: The preview.
        split: The split that is shown.
        settings: The run's data set.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # brackets and bars are no ASCII
    console = Console(highlight=False, markup=False, emoji=False)
    has_colours = console.color_system is not None and not console.no_color
    console.print(_legend(has_colours))
    for shown in preview.shown:
        console.print()
        _print_example(console, shown, has_colours)
    sections = [
        _count_lines(preview, settings),
        _note_lines(preview),
        _length_lines(preview, split, settings),
    ]
    for line in [line for section in sections for line in ("", *section) if section]:
        console.print(line, soft_wrap=True)


def _legend(has_colours: bool) -> Text:
    if has_colours:
        return Text.assemble(
            ("trained", TRAINED), "  ", ("special token", SPECIAL), "  ", ("cut", CUT),
            f"  {LINE_BREAK} a line break that is trained",
        )  # fmt: skip
    return Text(
        f"{mark('trained', Kind(True, False, False))} {mark('cut', Kind(False, True, False))}"
    )


LINE_BREAK = "↵"


def _print_example(console: Console, shown: ShownExample, has_colours: bool) -> None:
    is_terminal = console.is_terminal
    if is_terminal:
        place = _shorten(shown.place, console.width - len(shown.split) - 4)
        console.print(
            Rule(Text(f"{shown.split} {place}", "bold"), align="left", style="dim")
        )
    else:
        console.print(f"-- {shown.split} {shown.place}", soft_wrap=True)
    console.print(Text(_facts(shown), "dim"))
    text = Text()
    for segment in segments_of(shown.tokens, special=has_colours):
        if has_colours:
            text.append(_visible(segment), _style(segment.kind))
        else:
            text.append(mark(_printable(segment.text), segment.kind))
    if is_terminal:
        console.print(text, overflow="fold")
    else:
        console.print(text, soft_wrap=True)


def _facts(shown: ShownExample) -> str:
    trained = sum(token.kind.trained for token in shown.tokens)
    cut = sum(token.kind.cut for token in shown.tokens)
    facts = [f"{len(shown.tokens)} tokens", f"{trained} trained"]
    if cut:
        facts.append(f"{cut} cut")
    example = shown.example
    if example.turns:
        facts.insert(0, counted(example.turns, "turn"))
    if example.turns_left_out:
        facts.insert(1, f"{example.turns_left_out} before them left out")
    return ", ".join(facts)


def mark(text: str, kind: Kind) -> str:
    """Put brackets around text that is trained or cut."""
    if kind.cut:
        return f"⟪{text}⟫"
    return f"⟦{text}⟧" if kind.trained else text


def _style(kind: Kind) -> str:
    if kind.cut:
        return CUT
    if kind.trained:
        return TRAINED
    return SPECIAL if kind.special else ""


def _visible(segment: Segment) -> str:
    text = _printable(segment.text)
    return text.replace("\n", f"{LINE_BREAK}\n") if segment.kind.trained else text


def _printable(text: str) -> str:
    """The text with control characters as pictures: they would act on the terminal."""
    return "".join(
        chr(0x2400 + ord(character))
        if ord(character) < 32 and character not in "\n\t"
        else character
        for character in text
    )


def _count_lines(preview: Preview, settings: DatasetSettings) -> list[str]:
    """What became of all rows."""
    lines = [f"{'format':12}{', '.join(preview.formats)}"]
    for split in SPLITS:
        rows, examples = preview.rows[split], preview.examples[split]
        further = "" if examples == rows else f", {counted(examples, 'example')}"
        lines.append(f"{split:12}{counted(rows, 'row')}{further}")
    left_out = counted(preview.left_out.total(), "row")
    if preview.examples_left_out:
        left_out += f", {counted(preview.examples_left_out.total(), 'example')}"
    lines.append(f"{'left out':12}{left_out}")
    lines.append(f"{'cut':12}{counted(preview.cut, 'example')}")
    if preview.shortened:
        lines.append(f"{'shortened':12}{counted(preview.shortened, 'example')}")
    lines.append(f"{'not learnt':12}{counted(preview.unlearnt.total(), 'answer')}")
    if settings.packing:
        joined = f"rows are joined to sequences of {settings.max_length} tokens"
        lines.append(f"{'packing':12}{joined}; each is shown alone")
    return lines


def _note_lines(preview: Preview) -> list[str]:
    """What a run logs: the reasons behind the counts, and how the rows were read."""
    lines = []
    for note in preview.notes:
        lines += textwrap.wrap(
            f"- {note}",
            WIDTH,
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
    return lines


def _length_lines(preview: Preview, split: str, settings: DatasetSettings) -> list[str]:
    """The histogram, and the longest and shortest rows."""
    sizes = sorted(preview.lengths)
    limit = "null" if settings.max_length is None else str(settings.max_length)
    examples = counted(len(sizes), f"{split} example")
    lines = [
        f"tokens of {examples}: median {statistics.median(sizes):g}, longest {sizes[-1]}, "
        f"dataset.max_length={limit}"
    ]
    lines += histogram(sizes, WIDTH)
    lines += [_place_line("longest", length) for length in preview.longest]
    lines += [_place_line("shortest", length) for length in preview.shortest]
    return lines


def _place_line(name: str, length: ExampleLength) -> str:
    place = _shorten(length.place, WIDTH - 20)
    return f"{name:9}{length.tokens:9,}  {place}"


def _shorten(place: str, width: int) -> str:
    """A place without the beginning of its path, where it is too long."""
    return place if len(place) <= width else f"…{place[1 - width :]}"


def histogram(sizes: Sequence[int], width: int) -> list[str]:
    """Return bars of how many sizes lie in ranges of the same width.

    Where a few sizes (1 %) are far beyond the others, the last bar holds them, so that one very
    long row does not leave a single bar for all others.

    Args:
        sizes: Whole numbers in ascending order, at least one.
        width: Columns of a line.
    """
    low, nearly_all, high = sizes[0], sizes[(len(sizes) - 1) * 99 // 100], sizes[-1]
    has_outliers = high - low > OUTLIER * (nearly_all - low)
    step = _round_step(low, nearly_all if has_outliers else high)
    first = sizes[0] // step
    counts = [0] * (MOST_BINS + 2)
    for size in sizes:
        counts[min(size // step - first, MOST_BINS + 1)] += 1
    last = max(number for number, count in enumerate(counts) if count)
    labels = []
    for number in range(first, first + last + 1):
        begin, end = number * step, (number + 1) * step - 1
        labels.append(str(begin) if step == 1 else f"{begin}-{end}")
    if last == MOST_BINS + 1:
        labels[-1] = f"{(first + last) * step} and more"
    label_width = max(map(len, labels))
    count_width = len(f"{max(counts):,}")
    room = width - label_width - count_width - 3
    lines = []
    for label, count in zip(labels, counts, strict=False):
        bar = "█" * (-(-count * room // max(counts)))
        lines.append(f"{label:>{label_width}} {count:>{count_width},} {bar}".rstrip())
    return lines


def _round_step(low: int, high: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that divides a range into at most `MOST_BINS` bins."""
    step = 1
    factors = [2, 2.5, 2]
    while high // step - low // step >= MOST_BINS:
        step = int(step * factors[0])
        factors = [*factors[1:], factors[0]]
    return step
