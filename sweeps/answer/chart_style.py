"""Colours and layout of all charts in the report."""

import plotly.graph_objects as go
from optuna.trial import TrialState

BLUE = "#2563eb"
ORANGE = "#d97706"
GREY = "#94a3b8"
RED = "#dc2626"
GREEN = "#059669"
VIOLET = "#7c3aed"


STATES = {
    TrialState.PRUNED: GREY,
    TrialState.COMPLETE: BLUE,
    TrialState.FAIL: RED,
    TrialState.RUNNING: VIOLET,
}
"""Colour of each state, in drawing order."""


def set_titles(figure: go.Figure, x: str, y: str) -> go.Figure:
    """Apply the report's style and set the titles of both axes."""
    return set_style(figure).update_layout(xaxis_title=x, yaxis_title=y)


def set_style(figure: go.Figure) -> go.Figure:
    """Apply the report's style; titles are outside of the charts."""
    return figure.update_layout(
        template="plotly_white", title=None, width=None, autosize=True, height=420,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )  # fmt: skip
