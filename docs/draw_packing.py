"""The pictures of docs/how-packing-works.md, as SVG files.

python docs/draw_packing.py
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH = 1080
"""Width of a picture, in pixels."""

INK = "#1f2933"
MUTED = "#66788a"
FRAME = "#cbd5df"
BASE_COLOR = "#e4e9ef"
SLOT_COLORS = ("#2f6fc4", "#d9822b", "#2f9e6a", "#8a56c2")
"""Of trials, in the order in which they begin."""


@dataclass
class Picture:
    """An SVG picture that is drawn from top to bottom."""

    height: int
    elements: list[str] = field(default_factory=list)

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        opacity: float = 1.0,
        stroke: str = "none",
        dashed: bool = False,
    ) -> None:
        """Add a rectangle with rounded corners."""
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
            f'fill="{fill}" fill-opacity="{opacity:g}" stroke="{stroke}"{dashes}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 14,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Add one line of text; `y` is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def line(
        self,
        x1: float,
        y1: float,
        x2: float,
        y2: float,
        stroke: str,
        arrow: bool = False,
    ) -> None:
        """Add a straight line, with an arrowhead at its end if asked for."""
        marker = ' marker-end="url(#arrow)"' if arrow else ""
        self.elements.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" '
            f'stroke="{stroke}" stroke-width="1.5"{marker}/>'
        )

    def arc(self, x1: float, x2: float, y: float, depth: float, stroke: str) -> None:
        """Add an arc below a line, from `x1` to an arrowhead at `x2`."""
        self.elements.append(
            f'<path d="M {x1:g} {y:g} C {x1:g} {y + depth:g}, {x2:g} {y + depth:g}, {x2:g} {y:g}" '
            f'fill="none" stroke="{stroke}" stroke-width="1.5" marker-end="url(#arrow)"/>'
        )

    def write(self, path: Path) -> None:
        """Write the picture as an SVG file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" font-family="Helvetica, Arial, sans-serif">'
        )
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker>'
            "</defs>"
        )
        background = '<rect width="100%" height="100%" fill="#ffffff"/>'
        path.write_text(
            "\n".join([head, arrow, background, *self.elements, "</svg>\n"])
        )


@dataclass(frozen=True)
class DrawnRow:
    """A row's length in pixels: what its batch begins with, the rest of its prompt, its answer."""

    prefix: int
    prompt: int
    answer: int

    @property
    def length(self) -> int:
        """The whole row."""
        return self.prefix + self.prompt + self.answer


BATCHES = (
    (DrawnRow(68, 28, 74), DrawnRow(68, 36, 34), DrawnRow(68, 22, 100)),
    (DrawnRow(68, 44, 48), DrawnRow(68, 24, 80)),
    (DrawnRow(68, 20, 40), DrawnRow(68, 48, 86)),
)
"""One batch of each slot."""


def draw_line() -> Picture:
    """Rows of three slots as padded batches, and as one line of tokens."""
    picture = Picture(height=655)
    picture.text(40, 36, "Three runs have a batch each", 18, bold=True)
    picture.text(
        40,
        58,
        "The usual way: one padded batch after the other. Every row is filled up to the longest.",
        14,
        MUTED,
    )
    _draw_legend(picture, 40, 78)
    _draw_padded_batches(picture, 128)
    picture.text(
        40, 300, "Packed: the same batches as one line of tokens", 18, bold=True
    )
    picture.text(
        40,
        322,
        "No padding. The system prompt that all rows of a batch begin with is laid once.",
        14,
        MUTED,
    )
    _draw_packed_line(picture, 364)
    return picture


def _draw_legend(picture: Picture, x: float, y: float) -> None:
    color = SLOT_COLORS[0]
    entries = (
        ("shared prefix (system prompt)", color, 1.0, False),
        ("rest of the prompt", color, 0.22, False),
        ("answer: the loss counts it", color, 0.6, False),
        ("padding", "#ffffff", 1.0, True),
    )
    for label, fill, opacity, dashed in entries:
        picture.rectangle(x, y, 22, 14, fill, opacity, FRAME, dashed)
        picture.text(x + 30, y + 12, label, 13)
        x += 58 + 7 * len(label)


def _draw_padded_batches(picture: Picture, y: float) -> None:
    x = 40.0
    for slot, rows in enumerate(BATCHES):
        longest = max(row.length for row in rows)
        label = f"slot {slot}: a batch of {len(rows)} rows"
        picture.text(x, y, label, 13, SLOT_COLORS[slot], bold=True)
        for number, row in enumerate(rows):
            top = y + 12 + 34 * number
            _draw_row(picture, x, top, row, SLOT_COLORS[slot])
            padding = longest - row.length
            if padding:
                left = x + row.length
                picture.rectangle(
                    left, top, padding, 26, "#ffffff", 1.0, MUTED, dashed=True
                )
        x += longest + 130


def _draw_row(picture: Picture, x: float, y: float, row: DrawnRow, color: str) -> None:
    picture.rectangle(x, y, row.prefix, 26, color, 1.0, "#ffffff")
    picture.rectangle(x + row.prefix, y, row.prompt, 26, color, 0.22, color)
    picture.rectangle(x + row.prefix + row.prompt, y, row.answer, 26, color, 0.6, color)


def _draw_packed_line(picture: Picture, y: float) -> None:
    x = 40.0
    bounds = []
    for slot, rows in enumerate(BATCHES):
        begin = x
        prefix = rows[0].prefix
        color = SLOT_COLORS[slot]
        picture.rectangle(x, y, prefix, 34, color, 1.0, "#ffffff")
        x += prefix
        for number, row in enumerate(rows):
            picture.rectangle(x, y, row.prompt, 34, color, 0.22, color)
            picture.rectangle(x + row.prompt, y, row.answer, 34, color, 0.6, color)
            middle = x + (row.prompt + row.answer) / 2
            picture.text(middle, y - 7, f"row {number}", 12, MUTED, "middle")
            picture.line(x, y - 4, x, y + 34, "#ffffff")
            picture.arc(middle, begin + prefix / 2, y + 36, 22 + 16 * number, MUTED)
            x += row.prompt + row.answer
        bounds.append((begin, x))
        x += 4
    end = bounds[-1][1]
    note = (
        "Attention: a row attends to itself and to its batch's prefix, to no other row."
    )
    picture.text(40, y + 92, note, 13, MUTED)
    top = y + 134
    picture.text(40, top - 10, "In each linear layer of the decoder:", 14, bold=True)
    picture.rectangle(40, top, end - 40, 40, BASE_COLOR, 1.0, FRAME)
    product = "frozen base: one product W · x for the tokens of all slots"
    picture.text((40 + end) / 2, top + 25, product, 14, INK, "middle")
    picture.text(end + 14, top + 25, "shared", 13, MUTED)
    for slot, (begin, stop) in enumerate(bounds):
        color = SLOT_COLORS[slot]
        picture.text((begin + stop) / 2, top + 58, "+", 16, INK, "middle")
        picture.rectangle(begin, top + 66, stop - begin, 40, color, 0.22, color)
        label = f"adapter of slot {slot}: B{slot} · A{slot} · x"
        picture.text((begin + stop) / 2, top + 91, label, 13, INK, "middle")
    picture.text(end + 14, top + 91, "one per slot", 13, MUTED)
    picture.text(
        40,
        top + 136,
        "Backward: the gradient flows through W to the tokens of all slots, and into each slot's "
        "A and B from its own tokens alone.",
        13,
        MUTED,
    )


PASS_WIDTH = 128
FIRST_PASS = 150
LANE = 34

TRIALS = (
    (0, "trial 0", 0, "TTETTTT"),
    (1, "trial 1", 0, "TTE"),
    (2, "trial 2", 0, "TTETTTT"),
    (1, "trial 3", 5, "TT"),
)
"""Slot, name, first pass and requests of each trial: T is a batch to train on, E an evaluation."""

HOST_WORK = (
    (3, 0, 1, "end of trial 1"),
    (3, 1, 3, "start of trial 3"),
    (4, 0, 3, "adapter of trial 3"),
)
"""Pass, line, trial and label of what the host does while the GPU computes."""


def draw_passes() -> Picture:
    """Seven passes of a worker with three slots, one trial pruned at its rung."""
    picture = Picture(height=590)
    picture.text(40, 36, "A worker with three slots, pass by pass", 18, bold=True)
    picture.text(
        40,
        58,
        "In each pass the requests of all slots are executed together. "
        "Pass 3 is a rung: trial 1 is pruned there, and trial 3 takes its slot.",
        14,
        MUTED,
    )
    for number in range(7):
        picture.text(
            _pass_x(number) + 58, 92, f"pass {number + 1}", 13, MUTED, "middle"
        )
    _draw_slots(picture, 106)
    _draw_device(picture, 280)
    _draw_host(picture, 376)
    _draw_one_pass(picture, 494)
    return picture


def _pass_x(number: int) -> float:
    return FIRST_PASS + PASS_WIDTH * number


def _draw_slots(picture: Picture, y: float) -> None:
    for slot in range(3):
        top = y + 52 * slot
        picture.text(40, top + 22, f"slot {slot}", 14, bold=True)
    for trial, (slot, name, first, requests) in enumerate(TRIALS):
        for offset, request in enumerate(requests):
            label = f"{name}: " + ("train" if request == "T" else "evaluate")
            x = _pass_x(first + offset)
            color = SLOT_COLORS[trial]
            picture.rectangle(
                x, y + 52 * slot, 116, LANE, color, _opacity(request), color
            )
            picture.text(x + 58, y + 52 * slot + 22, label, 12, INK, "middle")
    idle = 2 * PASS_WIDTH - 12
    picture.rectangle(
        _pass_x(3), y + 52, idle, LANE, "#ffffff", 1.0, MUTED, dashed=True
    )
    label = "trial 1 pruned, trial 3 starts"
    picture.text(_pass_x(3) + idle / 2, y + 74, label, 12, MUTED, "middle")


def _opacity(request: str) -> float:
    return 0.6 if request == "T" else 0.22


def _draw_device(picture: Picture, y: float) -> None:
    picture.text(40, y + 22, "GPU", 14, bold=True)
    for number in range(7):
        active = [
            (trial, requests[number - first])
            for trial, (_, _, first, requests) in enumerate(TRIALS)
            if first <= number < first + len(requests)
        ]
        active.sort(key=lambda entry: TRIALS[entry[0]][0])
        width = 116 / 3
        for position, (trial, request) in enumerate(active):
            x = _pass_x(number) + width * position
            color = SLOT_COLORS[trial]
            picture.rectangle(x, y, width, LANE, color, _opacity(request), "#ffffff")
        picture.rectangle(
            _pass_x(number), y, width * len(active), LANE, "none", 1.0, INK
        )
    picture.text(
        FIRST_PASS,
        y + 54,
        "One line of tokens through the base in each pass. An idle slot makes the pass shorter.",
        13,
        MUTED,
    )


def _draw_host(picture: Picture, y: float) -> None:
    picture.text(40, y + 22, "host", 14, bold=True)
    lines = (
        "While the GPU computes, the host writes the",
        "files of the pruned trial and claims and",
        "prepares the next one.",
    )
    for number, line in enumerate(lines):
        picture.text(FIRST_PASS, y + 16 + 18 * number, line, 13, MUTED)
    for number, line, trial, label in HOST_WORK:
        color = SLOT_COLORS[trial]
        top = y + 40 * line
        picture.rectangle(_pass_x(number), top, 116, LANE, color, 0.22, color)
        picture.text(_pass_x(number) + 58, top + 22, label, 12, INK, "middle")


def _draw_one_pass(picture: Picture, y: float) -> None:
    picture.text(40, y, "One pass", 16, bold=True)
    steps = (
        ("1  Each run yields a request", "ForwardBackward or Evaluate"),
        ("2  The bank executes them", "together, as one line of tokens"),
        ("3  Each run gets its response", "loss and gradient, or evaluation"),
        ("4  Each run continues", "optimizer step, report, next request"),
    )
    for number, (title, detail) in enumerate(steps):
        x = 40 + 254 * number
        picture.rectangle(x, y + 16, 234, 58, BASE_COLOR, 0.6, FRAME)
        picture.text(x + 10, y + 40, title, 14)
        picture.text(x + 10, y + 60, detail, 12, MUTED)
        if number < len(steps) - 1:
            picture.line(x + 236, y + 45, x + 252, y + 45, MUTED, arrow=True)


def main() -> None:
    """Draw both pictures."""
    pictures = Path(__file__).parent / "pictures"
    draw_line().write(pictures / "packing-line.svg")
    draw_passes().write(pictures / "packing-passes.svg")


if __name__ == "__main__":
    main()
