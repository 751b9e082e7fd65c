"""The course of a search, drawn: learning curves, progress, where the budget went.

Figures carry no theme: the page that shows them has a light and a dark one. Texts from a run are
escaped, as plotly takes some of HTML for its own.
"""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.ticker import MaxNLocator

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.reporting.mistakes import Mistakes
from tune_mnist.reporting.statistics import epochs_by_band, milestones, worker_seconds
from tune_mnist.runs.formatting import differences, duration
from tune_mnist.runs.history import TrialRecord
from tune_mnist.runs.ranking import RankedTrial
from tune_mnist.runs.view import RunView

# Each can be told from the others, and seen on white as well as on black.
BEST, BASELINE = "#2a9d5c", "#e08a2e"
STATES = {
    "complete": "#3f86d0",
    "stopped": "#8a94a3",
    "running": "#35a7a7",
    "diverged": "#a86fd1",
    "failed": "#d9534f",
}
RUNS = ("#3f86d0", "#e08a2e", "#2a9d5c", "#a86fd1", "#d9534f", "#35a7a7", "#c2a33c", "#8a94a3")
MOST_CURVES = 400  # more make a page slow and tell nothing
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999)
_FEW_TICKS = 3
_LEAST_ERROR = 1e-4  # one image in 10,000: where 100% is drawn


def error(accuracy: float) -> float:
    """Return where an accuracy is drawn: its axes are logarithmic in the errors left."""
    return max(1 - accuracy, _LEAST_ERROR)


def accuracy_axis(title: str, accuracies: Sequence[float]) -> dict[str, Any]:
    """Return an axis for `error` that reads as accuracy, the better the higher."""
    ticks = accuracy_ticks(accuracies)
    return {
        "title": {"text": title},
        "type": "log",
        "autorange": "reversed",
        "tickvals": [error(tick) for tick in ticks],
        "ticktext": [f"{100 * tick:.6g}%" for tick in ticks],
    }


def accuracy_ticks(accuracies: Sequence[float]) -> list[float]:
    """Return where an axis with these accuracies has its ticks: as errors halve, or evenly."""
    low, high = min(accuracies, default=0.0), max(accuracies, default=1.0)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) < _FEW_TICKS:
        ticks = [float(tick) for tick in MaxNLocator(nbins=5).tick_values(low, high) if tick < 1]
    return ticks


def name_of_metric(metric: str) -> str:
    """Return a metric's name as a person says it."""
    return {"val_accuracy": "held-out accuracy", "test_accuracy": "test accuracy"}[metric]


def learning_curves(run: RunView) -> go.Figure:
    """Draw every trial's curve, and where ASHA cut it off."""
    best = run.ranked[0].record if run.ranked else None
    baseline = run.baseline.record if run.baseline else None
    others = [record for record in drawn_trials(run) if record not in (best, baseline)]
    figure = go.Figure()
    for state, colour in reversed(STATES.items()):
        trials = [record for record in others if record.state == state]
        if trials:
            width, opacity = (1.0, 0.55) if state == "stopped" else (1.6, 0.8)
            figure.add_trace(_curves(run, trials, state, colour, width, opacity))
    cut = [record for record in others if record.state == "stopped" and record.finite_rows]
    if cut:
        figure.add_trace(_cuts(run, cut))
    if baseline:
        figure.add_trace(_curves(run, [baseline], "baseline", BASELINE, 3.0, 1.0))
    if best and best is not baseline:
        figure.add_trace(_curves(run, [best], f"best, trial {best.number}", BEST, 3.0, 1.0))
    drawn = [value for trace in figure.data for value in trace.customdata or () if value]
    few = {"dtick": 1} if run.epochs <= 12 else {}
    figure.update_layout(
        height=460,
        hovermode="closest",
        xaxis={"title": {"text": "epoch"}, **few},
        yaxis=accuracy_axis(name_of_metric(run.metric), drawn),
    )
    return figure


def drawn_trials(run: RunView) -> list[TrialRecord]:
    """Return the trials whose curves are drawn: all, or the best and an even choice of others."""
    trials = list(run.history.trials.values())
    if len(trials) <= MOST_CURVES:
        return trials
    chosen = {each.record.number for each in run.ranked[: MOST_CURVES // 2]}
    chosen |= {each.number for each in trials[:: -(-len(trials) * 2 // MOST_CURVES)]}
    return [each for each in trials if each.number in chosen]


def progress(runs: Sequence[RunView], *, by_time: bool) -> go.Figure:
    """Draw the best so far against the time, or the epochs, that the search had spent."""
    figure = go.Figure()
    longest = max((run.history.elapsed for run in runs), default=0.0)
    unit, seconds = ("seconds", 1.0) if longest < 120 else ("minutes", 60.0)
    if longest > 2 * 3600:
        unit, seconds = "hours", 3600.0
    for position, run in enumerate(runs):
        found = milestones(run.history, run.metric)
        if not found:
            continue
        end = run.history.elapsed / seconds if by_time else len(run.history.rows)
        xs = [each.row.elapsed / seconds if by_time else each.epochs for each in found] + [end]
        texts = [f"trial {each.record.number} at epoch {each.row.epoch}" for each in found]
        names = [run.metric] if run.metric == "test_accuracy" or len(runs) > 1 else []
        for name in names or ["val_accuracy", "test_accuracy"]:
            values = [getattr(each.row, name) for each in found]
            values.append(values[-1])
            label = html.escape(run.folder.name) if len(runs) > 1 else name_of_metric(name)
            colour = RUNS[position % len(RUNS)] if len(runs) > 1 or name == run.metric else BEST
            figure.add_trace(
                go.Scatter(
                    x=xs,
                    y=[error(value) for value in values],
                    customdata=values,
                    text=[*texts, "now" if run.state == "running" else "end"],
                    name=label,
                    mode="lines+markers",
                    line={"shape": "hv", "width": 2, "color": colour},
                    marker={"size": 5},
                    hovertemplate="%{customdata:.2%}<br>%{text}<extra>%{fullData.name}</extra>",
                )
            )
    title = f"{unit} since the start" if by_time else "epochs trained, all trials together"
    figure.update_layout(
        height=380,
        hovermode="closest",
        xaxis={"title": {"text": title}, "rangemode": "tozero"},
        yaxis=accuracy_axis("best so far", [v for t in figure.data for v in t.customdata]),
    )
    return figure


def budget(run: RunView) -> go.Figure:
    """Draw between which rungs the epochs were spent, and on trials that came to what."""
    found = epochs_by_band(run.history, run.epochs)
    figure = go.Figure()
    for state, colour in STATES.items():
        spent = [by_state[state] for by_state in found.values()]  # type: ignore[index]
        if any(spent):
            figure.add_trace(
                go.Bar(
                    x=[f"epoch {band}" for band in found],
                    y=spent,
                    name=state,
                    marker={"color": colour},
                    hovertemplate=f"%{{y:,}} epochs of trials that are {state}<extra></extra>",
                )
            )
    figure.update_layout(
        height=340,
        barmode="stack",
        xaxis={"type": "category"},
        yaxis={"title": {"text": "epochs trained"}},
    )
    return figure


def time_spent(run: RunView) -> go.Figure:
    """Draw what the workers' time went to."""
    colours = (STATES["complete"], STATES["running"], STATES["stopped"])
    figure = go.Figure()
    spent = worker_seconds(run.history)
    whole = sum(spent.values()) or 1.0
    for (what, seconds), colour in zip(spent.items(), colours, strict=True):
        figure.add_trace(
            go.Bar(
                x=[seconds / whole],
                y=[""],
                orientation="h",
                name=f"{what} {seconds / whole:.0%}",
                marker={"color": colour},
                hovertemplate=f"{what}: {duration(seconds)}<extra></extra>",
            )
        )
    figure.update_layout(height=150, barmode="stack", xaxis={"tickformat": ".0%", "range": [0, 1]})
    return figure


def confirmed_winners(confirmed: pd.DataFrame) -> go.Figure:
    """Draw the means over fresh seeds with their 95% intervals, the best at the top."""
    table = confirmed.iloc[::-1]
    figure = go.Figure(
        go.Scatter(
            x=table["test_accuracy_mean"],
            y=[html.escape(str(name)) for name in table["configuration"]],
            error_x={
                "type": "data",
                "array": table["interval_high"] - table["test_accuracy_mean"],
                "arrayminus": table["test_accuracy_mean"] - table["interval_low"],
                "color": STATES["stopped"],  # plotly's own is lost on black
                "thickness": 2,
                "width": 6,
            },
            mode="markers",
            marker={
                "size": 11,
                "color": [BASELINE if n == "baseline" else BEST for n in table["configuration"]],
            },
            customdata=table["n"],
            hovertemplate="%{x:.3%} over %{customdata} seeds<extra>%{y}</extra>",
        )
    )
    figure.update_layout(
        height=120 + 44 * len(table),
        xaxis={"tickformat": ".2%", "title": {"text": "test accuracy at the last epoch"}},
    )
    return figure


def _curves(
    run: RunView, trials: list[TrialRecord], name: str, colour: str, width: float, opacity: float
) -> go.Scatter:
    """Make one trace of many curves, a gap between two: a trace each would be slow."""
    xs: list[int | None] = []
    values: list[float | None] = []
    texts: list[str] = []
    reference = run.baseline.record.config if run.baseline else TrainConfig()
    for record in trials:
        what = html.escape(f"trial {record.number}: {differences(record.config, reference)}")
        for row in record.rows:
            if row.counts(run.metric):
                xs.append(row.epoch)
                values.append(row.accuracy(run.metric))
                texts.append(what)
        xs.append(None)
        values.append(None)
        texts.append("")
    return go.Scatter(
        x=xs,
        y=[None if value is None else error(value) for value in values],
        customdata=values,
        text=texts,
        name=html.escape(name),
        mode="lines+markers",
        opacity=opacity,
        line={"width": width, "color": colour},
        marker={"size": 2 + 1.5 * width},
        hovertemplate="%{customdata:.2%} at epoch %{x}<br>%{text}<extra></extra>",
    )


def _cuts(run: RunView, trials: list[TrialRecord]) -> go.Scatter:
    standings = [RankedTrial.of(record, run.metric) for record in trials]
    ends = [(each.record, each.last) for each in standings if each.last]
    return go.Scatter(
        x=[row.epoch for _, row in ends],
        y=[error(row.accuracy(run.metric)) for _, row in ends],
        text=[f"trial {record.number}" for record, _ in ends],
        name="cut by ASHA",
        mode="markers",
        marker={"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": STATES["failed"]}},
        hovertemplate="%{text} stopped after epoch %{x}<extra></extra>",
    )


# MERGED-DOC analysis.plots_mistakes: Which digits a model takes for which, drawn.

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
