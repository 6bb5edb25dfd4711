"""Colours and layout of all charts in the report.

All colours are legible on white and on the dark page, whose style sheet recolours texts and grids.
"""

import plotly.graph_objects as go
from optuna.trial import TrialState

BLUE = "#2563eb"
ORANGE = "#d97706"
GREY = "#94a3b8"
RED = "#dc2626"
GREEN = "#059669"
VIOLET = "#8b5cf6"
SLATE = "#64748b"
CLEAR = "rgba(0, 0, 0, 0)"


SCALE = [[0.0, GREY], [1.0, BLUE]]
"""A colour scale whose both ends are legible on a light and on a dark page."""


STATES = {
    TrialState.PRUNED: GREY,
    TrialState.COMPLETE: BLUE,
    TrialState.FAIL: RED,
    TrialState.RUNNING: VIOLET,
}
"""Colour of each state, in drawing order."""


def set_titles(figure: go.Figure, x: str, y: str) -> go.Figure:
    """Apply the report's style and set the titles of both axes."""
    return set_style(figure.update_layout(xaxis_title=x, yaxis_title=y))


def set_style(figure: go.Figure) -> go.Figure:
    """Apply the report's style; titles are outside of the charts."""
    axis_3d = {"backgroundcolor": CLEAR, "color": SLATE, "gridcolor": GREY}
    if any(trace.type == "scatter3d" for trace in figure.data):
        figure.update_scenes(xaxis=axis_3d, yaxis=axis_3d, zaxis=axis_3d)
    figure.update_xaxes(title_font_size=14).update_yaxes(title_font_size=14)
    return figure.update_layout(
        template="plotly_white", title=None, width=None, autosize=True, height=420,
        paper_bgcolor=CLEAR, plot_bgcolor=CLEAR,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        font={"family": "system-ui, sans-serif", "size": 13},
    )  # fmt: skip
