"""The main charts as PNG files, for a README or a slide.

matplotlib draws them, not plotly as on the page: plotly needs a whole browser to make a PNG.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from tune_mnist.reporting.charts import (
    STATES,
    accuracy_ticks,
    curve_groups,
    error,
    name_of_metric,
    progress_lines,
)
from tune_mnist.runs.view import RunView

_DPI = 150


def write_pictures(
    runs: Sequence[RunView], page: Path, write: Callable[[Path, bytes], None]
) -> list[Path]:
    """Draw the runs' progress and, of a single run, its learning curves, beside the page."""
    figures = {"progress": _progress(runs)}
    if len(runs) == 1:
        figures["curves"] = _curves(runs[0])
    written = []
    for name, figure in figures.items():
        path = page.with_name(f"{page.stem}-{name}.png")
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        write(path, buffer.getvalue())
        written.append(path)
    return written


def _progress(runs: Sequence[RunView]) -> Figure:
    figure, axes = _figure("epochs trained, all trials together", "best so far")
    for line in progress_lines(runs):
        values = [error(each.row.accuracy(line.metric)) for each in line.found]
        axes.step(
            [*(each.epochs for each in line.found), len(line.run.history.rows)],
            [*values, values[-1]],
            where="post",
            color=line.colour,
            label=line.label.replace("$", r"\$"),  # a $ would begin a formula
            linewidth=2,
        )
    _finish(axes)
    return figure


def _curves(run: RunView) -> Figure:
    figure, axes = _figure("epoch", name_of_metric(run.metric))
    for group in curve_groups(run):
        label: str | None = group.label  # once
        for record in group.records:
            if rows := record.rows_that_count(run.metric):
                xs = [row.epoch for row in rows]
                ys = [error(row.accuracy(run.metric)) for row in rows]
                (line,) = axes.plot(xs, ys, color=group.colour, label=label)
                line.set(linewidth=0.85 * group.width, alpha=group.opacity)
                label = None
                if group.label == "stopped":
                    axes.plot(xs[-1], ys[-1], "x", color=STATES["failed"], markersize=4, zorder=3)
    _finish(axes)
    return figure


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.6), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(axes: Axes) -> None:
    """Turn the axis of errors into one that reads as accuracy, and add the legend."""
    if not axes.lines:
        axes.text(0.5, 0.5, "no epoch yet", ha="center", transform=axes.transAxes)
        return
    axes.set_yscale("log")
    axes.invert_yaxis()
    low, high = sorted(axes.get_ylim())
    axes.set_yticks([error(tick) for tick in accuracy_ticks([1 - high, 1 - low])])
    axes.set_ylim(high, low)  # the ticks have widened it
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda left, _: f"{100 * (1 - left):.6g}%"))
    axes.legend(frameon=False, fontsize="small")
