"""Which digits a model takes for which, drawn."""

import numpy as np
import plotly.graph_objects as go

from tune_mnist.analysis.mistakes import Mistakes

_DIGITS = [str(digit) for digit in range(10)]


def confusion(found: Mistakes) -> go.Figure:
    """Draw the mistakes by digit; what is right, a hundred times as much, stays blank."""
    wrong = found.confusion.astype(float)
    np.fill_diagonal(wrong, np.nan)
    texts = [["" if not count > 0 else f"{count:.0f}" for count in line] for line in wrong]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if np.isnan(count) else count for count in line] for line in wrong],
            x=_DIGITS,
            y=_DIGITS,
            text=texts,
            texttemplate="%{text}",
            colorscale=[[0.0, "rgba(217,83,79,0.0)"], [1.0, "rgba(217,83,79,0.9)"]],
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate="a %{y} read as %{x}: %{z:.0f}<extra></extra>",
        )
    )
    figure.update_layout(
        height=430,
        width=430,
        xaxis={"type": "category", "title": {"text": "read as"}, "showgrid": False},
        yaxis={
            "type": "category",
            "title": {"text": "is"},
            "autorange": "reversed",
            "showgrid": False,
        },
    )
    return figure
