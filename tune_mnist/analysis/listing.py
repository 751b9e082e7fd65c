"""The runs in a folder of results, as a table.

rich.console.Console().print(listing(Path("results")))
"""

import time
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tune_mnist.analysis.ranking import number
from tune_mnist.analysis.runs import RunState, RunView, find_runs
from tune_mnist.analysis.wording import duration, percent, short_path

_STYLES: dict[RunState, str] = {"running": "green", "killed": "red", "failed": "red"}


def listing(results: Path) -> Group:
    """Return the runs, the newest first, each with its state, its best and when it began."""
    runs, errors = find_runs(results)
    parts: list[RenderableType] = []
    if runs:
        parts.append(_table(runs))
    else:
        parts.append(Text(f"No run in {short_path(results)}."))
    parts += [Text(f"warning: {error}") for error in errors]
    return Group(*parts)


def _table(runs: list[RunView]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("trials", "best", "test", "took", "begun"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        best = run.ranked[0].best if run.ranked else None
        trials = len(run.history.trials)
        table.add_row(
            Text(run.folder.name),  # as it is: brackets are rich's own in plain strings
            Text(run.state, style=_STYLES.get(run.state, "")),
            f"{trials - len(run.history.unfinished()):,}/{_asked(run)}",
            "-" if best is None else percent(number(best, run.metric)),
            "-" if best is None else percent(number(best, "test_accuracy")),
            duration(run.history.elapsed),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun)),
        )
    return table


def _asked(run: RunView) -> str:
    trials = run.asked.get("trials")
    return f"{trials:,}" if isinstance(trials, int) else "?"
