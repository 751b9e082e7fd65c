"""report.html: what a run found, how sure that is and what it cost, on one page.

    write_report([RunView.read(Path("results/default"))], Path("results/default/report.html"))

assets/report.html is the page: its words and its order. Here is what it is filled with.
"""

import json
import secrets
import shlex
import time
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from tune_mnist.errors import RunFolderError, SearchSpaceError, TuneMnistError
from tune_mnist.locations import masked
from tune_mnist.reporting import charts
from tune_mnist.reporting.findings import find_mistakes
from tune_mnist.reporting.parameter_charts import (
    ENOUGH_TRIALS,
    importance_bars,
    importances,
    parallel_coordinates,
    slices,
)
from tune_mnist.reporting.png import write_pictures
from tune_mnist.reporting.summary import BestTable, cost, failures, headline, no_best
from tune_mnist.runs.confirmed import conclusion, confirmation_of, read_confirmed
from tune_mnist.runs.files import replace_file, write_output
from tune_mnist.runs.formatting import count, duration, percent, points, short_path
from tune_mnist.runs.ranking import gain
from tune_mnist.runs.view import RunView, SearchFile

SHOWN_MISTAKES = 80
_LONGEST_NAME = 120  # characters; file systems limit a file's name
_STATES = {
    "running": "still running as this was written",
    "interrupted": "interrupted, and can be resumed",
    "killed": "killed, and can be resumed",
    "failed": "ended by an error, and can be resumed",
}
_QUESTION = ("metric", "epochs", "images")  # runs that agree on these can be compared
_DEFAULTS = {"metric": "val_accuracy", "time_budget": None, "images": None}  # the command line's


def report_path(runs: Sequence[RunView]) -> Path:
    """Return a report's default path: in the run's folder; of several runs, beside the first."""
    first = runs[0].folder.path
    if len(runs) == 1:
        return first / "report.html"
    names = "-".join(run.folder.name for run in runs)
    return first.absolute().parent / f"report-{names[:_LONGEST_NAME]}.html"


def write_report(
    runs: Sequence[RunView],
    output: Path | None = None,
    *,
    data_dir: Path | None = None,
    pictures: bool = True,
) -> list[Path]:
    """Write a page about one run, or one that compares several, and return the files written.

    The runs may be at work or ended. `output` is the page's file if a user named it. `data_dir` is
    MNIST's folder, for the digits that the best model gets wrong; `pictures` are the main charts
    as PNG files. An OSError leaves the old file.
    """
    path, write = (output, write_output) if output else (report_path(runs), replace_file)
    assets = PackageLoader("tune_mnist.reporting", "assets")
    environment = Environment(
        loader=assets,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "points": points,
        "duration": duration,
        "counted": count,
        "short_path": short_path,
        "chart_data": _chart_data,
    }
    page = environment.get_template("report.html").render(
        nonce=secrets.token_urlsafe(16),
        css=assets.get_source(environment, "report.css")[0],
        js=assets.get_source(environment, "report.js")[0],
        plotly=get_plotlyjs(),
        comparison=_comparison(runs) if len(runs) > 1 else None,
        reports=[_report(run, data_dir) for run in runs],
        enough_trials=ENOUGH_TRIALS,
        shown_mistakes=SHOWN_MISTAKES,
    )
    write(path, page)
    return [path, *(write_pictures(runs, path, write) if pictures else ())]


def _chart_data(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as plain data, without the theme that plotly adds."""
    data: dict[str, Any] = json.loads(figure.to_json())
    del data["layout"]["template"]
    return data


def _comparison(runs: Sequence[RunView]) -> dict[str, Any]:
    """Return what only a page about several runs shows."""
    asked = {name: {getattr(run.asked, name) for run in runs} for name in _QUESTION}
    return {
        "differences": [name for name, values in asked.items() if len(values) > 1],
        "progress": _progress(runs) if any(run.history.rows for run in runs) else None,
    }


def _progress(runs: Sequence[RunView]) -> dict[str, go.Figure]:
    return {
        "by_epochs": charts.progress(runs, by_time=False),
        "by_time": charts.progress(runs, by_time=True),
    }


def _report(run: RunView, data_dir: Path | None) -> dict[str, Any]:
    """Return what the page shows of one run."""
    history, best, baseline = run.history, run.best, run.baseline
    return {
        "run": run,
        "begun": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun)),
        "state": _STATES.get(run.state, run.state),
        "metric": charts.name_of_metric(run.metric),
        "headline": headline(run.ranked, baseline, len(history.trials), run.metric).plain
        if best
        else no_best(history),
        "gain": gain(best.best if best else None, baseline.best if baseline else None),
        "cost": cost(history, run.asked.epochs),
        "failures": failures(history),
        "best_table": BestTable(run.ranked, baseline, run.metric).lines() if best else None,
        "confirmed": _confirmed(run),
        "course": _course(run) if history.rows else None,
        "parameters": _parameters(run) if best else None,
        "mistakes": _mistakes(run, data_dir),
        "commands": _commands(run),
        "settings": masked(
            yaml.safe_dump(run.folder.read_search(), sort_keys=False, allow_unicode=True)
        ),
    }


def _confirmed(run: RunView) -> dict[str, Any] | None:
    try:
        table = read_confirmed(run.folder)
    except RunFolderError as error:
        return {"problem": str(error)}
    if table is None:
        return None
    return {
        "problem": None,
        "conclusion": conclusion(table, run.metric),
        "chart": charts.confirmed_winners(table),
        "rows": table.to_dict("records"),
        "asked": confirmation_of(run.folder),
    }


def _course(run: RunView) -> dict[str, Any]:
    return {
        "curves": charts.learning_curves(run),
        "drawn": len(charts.drawn_trials(run)),
        "progress": _progress([run]),
        "budget": charts.budget(run),
        "time": charts.time_spent(run),
    }


def _parameters(run: RunView) -> dict[str, Any]:
    try:
        space = run.space
    except SearchSpaceError as error:
        return {"problem": str(error)}
    shares = importances(run.ranked, space, run.metric)
    return {
        "problem": None,
        "coordinates": parallel_coordinates(run, space),
        "width": 62 * (len(space.parameters) + 1) + 100,  # px
        "importance": importance_bars(shares) if shares else None,
        "slices": slices(run, space),
    }


def _mistakes(run: RunView, data_dir: Path | None) -> dict[str, Any]:
    try:
        found = find_mistakes(run.folder, data_dir)
    except TuneMnistError as error:
        return {"problem": str(error)}
    return {
        "problem": None,
        "found": found,
        "images": int(found.confusion.sum()),
        "confusion": charts.confusion(found),
    }


def _commands(run: RunView) -> list[str]:
    """Return the commands that repeat the search and its confirmation."""
    commands = [repeat_command(run.search)]
    asked = confirmation_of(run.folder)
    if asked and not run.search.confirm:
        words = ["python", "-m", "tune_mnist.confirm", short_path(run.folder.path)]
        words += ["--top", f"{len(asked.configurations) - 1}"]
        words += ["--seeds", f"{len(asked.seeds)}", "--epochs", f"{asked.epochs}"]
        if asked.images is not None:
            words += ["--images", f"{asked.images}"]
        commands.append(shlex.join(words))
    return commands


def repeat_command(search: SearchFile) -> str:
    """Return the command with the settings of a search.yaml.

    With a time budget, a faster machine trains more.
    """
    source = PurePath(search.space_source)
    # One of the project's own spaces goes by its name, wherever the project lay.
    space = source.stem if source.parent.name == "search_spaces" else str(source)
    words = ["python", "-m", "tune_mnist.search", "--space", space]
    for name, value in vars(search.asked).items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [option] * value
        elif value is not None and _DEFAULTS.get(name, _DEFAULTS) != value:
            words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    if search.confirm:
        words.append("--confirm")
    return shlex.join(words)
