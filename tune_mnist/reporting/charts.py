"""Charts of a search: its curves, its progress, its costs, its confirmed winners, its mistakes.

Figures have no theme: the page that shows them has a light and a dark one. Texts from a run are
escaped here, because plotly interprets some HTML.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.ticker import MaxNLocator

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.metrics import Metric
from tune_mnist.reporting.findings import (
    Milestone,
    Mistakes,
    epochs_by_band,
    milestones,
    worker_seconds,
)
from tune_mnist.runs.formatting import differences, duration
from tune_mnist.runs.history import TrialRecord
from tune_mnist.runs.view import RunView

# Distinct from each other, and visible on white as well as on black.
BEST, BASELINE = "#2a9d5c", "#e08a2e"
STATES = {
    "complete": "#3f86d0",
    "stopped": "#8a94a3",
    "running": "#35a7a7",
    "diverged": "#a86fd1",
    "failed": "#d9534f",
}
RUNS = ("#3f86d0", "#e08a2e", "#2a9d5c", "#a86fd1", "#d9534f", "#35a7a7", "#c2a33c", "#8a94a3")
MOST_CURVES = 400  # more make the page slow and show nothing new
_TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.995, 0.997, 0.998, 0.999)
_LEAST_ERROR = 1e-4  # one image in 10,000; 100% is drawn here


def error(accuracy: float) -> float:
    """Return the error rate, which the logarithmic axes of accuracy show."""
    return max(1 - accuracy, _LEAST_ERROR)


def accuracy_axis(title: str, accuracies: Sequence[float]) -> dict[str, Any]:
    """Return an axis for `error` that reads as accuracy, better upwards."""
    ticks = accuracy_ticks(accuracies)
    return {
        "title": {"text": title},
        "type": "log",
        "autorange": "reversed",
        "tickvals": [error(tick) for tick in ticks],
        "ticktext": [f"{100 * tick:.6g}%" for tick in ticks],
    }


def accuracy_ticks(accuracies: Sequence[float]) -> list[float]:
    """Return the ticks of an axis with these accuracies: where errors halve, or evenly spaced."""
    low, high = min(accuracies, default=0.0), max(accuracies, default=1.0)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    if len(ticks) >= 3:
        return ticks
    return [float(tick) for tick in MaxNLocator(nbins=5).tick_values(low, high) if tick < 1]


def name_of_metric(metric: Metric) -> str:
    return {"val_accuracy": "held-out accuracy", "test_accuracy": "test accuracy"}[metric]


@dataclass(frozen=True)
class CurveGroup:
    """Learning curves that are drawn alike, with one entry in the legend."""

    label: str
    records: list[TrialRecord]
    colour: str
    width: float
    opacity: float


def curve_groups(run: RunView) -> list[CurveGroup]:
    """Return the learning curves by state, then the baseline's and the best, in drawing order."""
    best = run.best.record if run.best else None
    baseline = run.baseline.record if run.baseline else None
    others = [record for record in drawn_trials(run) if record not in (best, baseline)]
    groups = []
    for state, colour in reversed(STATES.items()):
        records = [record for record in others if record.state == state]
        width, opacity = (1.0, 0.55) if state == "stopped" else (1.6, 0.8)
        groups.append(CurveGroup(state, records, colour, width, opacity))
    if baseline:
        groups.append(CurveGroup("baseline", [baseline], BASELINE, 3.0, 1.0))
    if best and best is not baseline:
        groups.append(CurveGroup(f"best, trial {best.number}", [best], BEST, 3.0, 1.0))
    return [group for group in groups if group.records]


def learning_curves(run: RunView) -> go.Figure:
    """Draw every trial's curve, and where ASHA stopped it."""
    groups = curve_groups(run)
    crosses = [_crosses(run, group.records) for group in groups if group.label == "stopped"]
    curves = [_curves(run, group) for group in groups]
    drawn = [value for curve in curves for value in curve.customdata if value]
    layout = go.Layout(
        height=460,
        xaxis_title="epoch",
        xaxis_dtick=1 if run.asked.epochs <= 12 else None,
        yaxis=accuracy_axis(name_of_metric(run.metric), drawn),
    )
    return go.Figure([*curves, *crosses], layout)


def drawn_trials(run: RunView) -> list[TrialRecord]:
    """Return the trials whose curves are drawn: all, or the best and some of the rest."""
    trials = list(run.history.trials.values())
    if len(trials) <= MOST_CURVES:
        return trials
    chosen = {trial.record.number for trial in run.ranked[: MOST_CURVES // 2]}
    chosen |= {record.number for record in trials[:: -(-len(trials) * 2 // MOST_CURVES)]}
    return [record for record in trials if record.number in chosen]


@dataclass(frozen=True)
class ProgressLine:
    """The best so far of a run, in one of its accuracies."""

    run: RunView
    metric: Metric
    found: list[Milestone]  # at least one
    label: str
    colour: str


def progress_lines(runs: Sequence[RunView]) -> list[ProgressLine]:
    """Return a line per run that has an epoch; of one alone, both accuracies if it has both."""
    lines = []
    for position, run in enumerate(runs):
        found = milestones(run.history, run.metric)
        metrics: list[Metric] = [run.metric]
        if len(runs) == 1 and run.metric == "val_accuracy":
            metrics.append("test_accuracy")
        for metric in metrics if found else ():
            label = run.folder.name if len(runs) > 1 else name_of_metric(metric)
            colour = RUNS[position % len(RUNS)] if metric == run.metric else BEST
            lines.append(ProgressLine(run, metric, found, label, colour))
    return lines


def progress(runs: Sequence[RunView], *, by_time: bool) -> go.Figure:
    """Draw the best so far against the time, or the epochs, that the search had spent."""
    traces = []
    longest = max((run.history.elapsed for run in runs), default=0.0)
    unit, seconds = ("seconds", 1.0) if longest < 120 else ("minutes", 60.0)
    if longest > 2 * 3600:
        unit, seconds = "hours", 3600.0
    for line in progress_lines(runs):
        history = line.run.history
        values = [each.row.accuracy(line.metric) for each in line.found]
        values.append(values[-1])
        xs: list[float] = [*(each.epochs for each in line.found), len(history.rows)]
        if by_time:
            times = [*(each.row.elapsed for each in line.found), history.elapsed]
            xs = [time / seconds for time in times]
        texts = [f"trial {each.record.number} at epoch {each.row.epoch}" for each in line.found]
        traces.append(
            go.Scatter(
                x=xs,
                y=[error(value) for value in values],
                customdata=values,
                text=[*texts, "now" if line.run.state == "running" else "end"],
                name=html.escape(line.label),
                mode="lines+markers",
                line={"shape": "hv", "width": 2, "color": line.colour},
                marker={"size": 5},
                hovertemplate="%{customdata:.2%}<br>%{text}<extra>%{fullData.name}</extra>",
            )
        )
    title = f"{unit} since the start" if by_time else "epochs trained, all trials together"
    layout = go.Layout(
        height=380,
        xaxis_title=title,
        xaxis_rangemode="tozero",
        yaxis=accuracy_axis("best so far", [v for t in traces for v in t.customdata]),
    )
    return go.Figure(traces, layout)


def budget(run: RunView) -> go.Figure:
    """Draw between which rungs the epochs were spent, and on trials of which final state."""
    found = epochs_by_band(run.history, run.asked.epochs)
    bars = [
        go.Bar(
            x=[f"epoch {band}" for band in found],
            y=[by_state[state] for by_state in found.values()],  # type: ignore[index]
            name=state,
            marker_color=colour,
            hovertemplate=f"%{{y:,}} epochs of trials that are {state}<extra></extra>",
        )
        for state, colour in STATES.items()
    ]
    layout = go.Layout(
        height=340, barmode="stack", xaxis_type="category", yaxis_title="epochs trained"
    )
    return go.Figure([bar for bar in bars if any(bar.y)], layout)


def time_spent(run: RunView) -> go.Figure:
    """Draw where the workers' time went."""
    colours = (STATES["complete"], STATES["running"], STATES["stopped"])
    spent = worker_seconds(run.history)
    whole = sum(spent.values()) or 1.0
    bars = [
        go.Bar(
            x=[seconds / whole],
            y=[""],
            orientation="h",
            name=f"{what} {seconds / whole:.0%}",
            marker_color=colour,
            hovertemplate=f"{what}: {duration(seconds)}<extra></extra>",
        )
        for (what, seconds), colour in zip(spent.items(), colours, strict=True)
    ]
    share = {"tickformat": ".0%", "range": [0, 1]}
    return go.Figure(bars, go.Layout(height=150, barmode="stack", xaxis=share))


def confirmed_winners(confirmed: pd.DataFrame) -> go.Figure:
    """Draw the means over fresh seeds with their 95% intervals, the best at the top."""
    table = confirmed.iloc[::-1]
    means = go.Scatter(
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
        marker_size=11,
        marker_color=[BASELINE if n == "baseline" else BEST for n in table["configuration"]],
        customdata=table["n"],
        hovertemplate="%{x:.3%} over %{customdata} seeds<extra>%{y}</extra>",
    )
    axis = {"tickformat": ".2%", "title": "test accuracy at the last epoch"}
    return go.Figure(means, go.Layout(height=120 + 44 * len(table), xaxis=axis))


def _curves(run: RunView, group: CurveGroup) -> go.Scatter:
    """Return one trace of many curves with gaps between them; a trace each would be slow."""
    xs: list[int | None] = []
    values: list[float | None] = []
    texts: list[str] = []
    reference = run.baseline.record.config if run.baseline else TrainConfig()
    for record in group.records:
        what = html.escape(f"trial {record.number}: {differences(record.config, reference)}")
        rows = record.rows_that_count(run.metric)
        xs += [*(row.epoch for row in rows), None]
        values += [*(row.accuracy(run.metric) for row in rows), None]
        texts += [*(what for _ in rows), ""]
    return go.Scatter(
        x=xs,
        y=[None if value is None else error(value) for value in values],
        customdata=values,
        text=texts,
        name=group.label,
        mode="lines+markers",
        opacity=group.opacity,
        line={"width": group.width, "color": group.colour},
        marker={"size": 2 + 1.5 * group.width},
        hovertemplate="%{customdata:.2%} at epoch %{x}<br>%{text}<extra></extra>",
    )


def _crosses(run: RunView, trials: list[TrialRecord]) -> go.Scatter:
    ends = [(each, rows[-1]) for each in trials if (rows := each.rows_that_count(run.metric))]
    return go.Scatter(
        x=[row.epoch for _, row in ends],
        y=[error(row.accuracy(run.metric)) for _, row in ends],
        text=[f"trial {record.number}" for record, _ in ends],
        name="where ASHA stopped",
        mode="markers",
        marker={"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": STATES["failed"]}},
        hovertemplate="%{text} stopped after epoch %{x}<extra></extra>",
    )


def confusion(found: Mistakes) -> go.Figure:
    """Draw the mistakes by digit; the diagonal, a hundred times as much, stays blank."""
    digits = [str(digit) for digit in range(10)]
    wrong = found.confusion.astype(object)
    np.fill_diagonal(wrong, None)
    counts = go.Heatmap(
        z=wrong.tolist(),
        x=digits,
        y=digits,
        text=[[count or "" for count in line] for line in wrong],
        texttemplate="%{text}",
        colorscale=[[0.0, "rgba(217,83,79,0.0)"], [1.0, "rgba(217,83,79,0.9)"]],
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate="a %{y} read as %{x}: %{z:.0f}<extra></extra>",
    )
    axis = {"type": "category", "showgrid": False}
    across, down = axis | {"title": "read as"}, axis | {"title": "is", "autorange": "reversed"}
    return go.Figure(counts, go.Layout(height=430, width=430, xaxis=across, yaxis=down))
