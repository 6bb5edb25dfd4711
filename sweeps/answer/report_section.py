"""A section of the report's page, as the template takes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from finetune.data.segments import Segment


@dataclass(frozen=True)
class Row:
    """A row of a section's table."""

    cells: Sequence[str]
    kind: str = ""
    """The row's style: winner, baseline, or empty."""
    link: str = ""
    """Address that the first cell leads to."""


@dataclass(frozen=True)
class ShownRow:
    """A row of the data set as text."""

    place: str
    """Its file and number."""
    segments: Sequence[Segment]
    """What is trained, what is cut, and the rest."""


@dataclass(frozen=True)
class Section:
    """A section of the page. Empty fields are not shown."""

    id: str
    title: str
    note: str = ""
    figures: Sequence[tuple[str, str]] = ()
    """Large numbers, each with its label."""
    lines: Sequence[str] = ()
    chart: str = ""
    """HTML of a chart."""
    head: Sequence[str] = ()
    """Column titles of the table."""
    rows: Sequence[Row] = ()
    sortable: bool = False
    samples: Sequence[Mapping[str, str]] = ()
    """Prompts with their expected answers, and the texts generated before and after training."""
    commands: Sequence[tuple[str, str]] = ()
    """Purposes and shell commands, each with a button that copies it."""
    shown_rows: Sequence[ShownRow] = ()
    folded: Sequence[tuple[str, str]] = ()
    """Titles and texts that are shown on a click."""

    @property
    def has_content(self) -> bool:
        """Whether there is anything to show under the title."""
        texts = (self.note, self.lines, self.chart, self.rows)
        more = (self.figures, self.samples, self.shown_rows, self.folded)
        return any(texts) or any(more) or bool(self.commands)


def chart_section(
    name: str,
    title: str,
    figure: go.Figure | None,
    note: str = "",
    min_width: int = 0,
) -> Section:
    """Build a section with one chart; an empty one if there is no chart.

    Args:
        name: the section's id.
        title: its title.
        figure: the chart.
        note: a line above the chart.
        min_width: pixels; on a narrower page the chart scrolls inside of its box.

    Returns:
        The section.
    """
    if figure is None:
        return Section(name, title)
    return Section(
        name,
        title,
        note,
        chart=chart_html(name, figure, min_width),
    )


def chart_html(name: str, figure: go.Figure | None, min_width: int = 0) -> str:
    """Render a chart as HTML that uses the page's copy of plotly; empty if there is no chart."""
    if figure is None:
        return ""
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"chart-{name}",
        config={"displaylogo": False, "responsive": True},
    )
    return f'<div style="min-width: {min_width}px">{html}</div>'
