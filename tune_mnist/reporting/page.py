"""report.html: what a run found, how sure that is and what it cost, on one page.

write_report([RunView.read(Path("results/default"))], Path("results/default/report.html"))
"""

import json
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import yaml
from plotly.offline import get_plotlyjs

from tune_mnist.errors import RunFolderError, TuneMnistError
from tune_mnist.reporting import charts as plots
from tune_mnist.reporting.charts import confusion
from tune_mnist.reporting.mistakes import find_mistakes
from tune_mnist.reporting.parameter_charts import (
    ENOUGH_TRIALS,
    importance_bars,
    importances,
    parallel_coordinates,
    searched_parameters,
    slices,
)
from tune_mnist.reporting.png import write_pictures
from tune_mnist.reporting.summary import BestTable, cost, failures, headline, nothing
from tune_mnist.runs.confirmed import claim, confirmed_lines, read_confirmed
from tune_mnist.runs.files import replace_file
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, percent, points, short_path
from tune_mnist.runs.ranking import gain
from tune_mnist.runs.view import RunView

# MERGED-DOC analysis.report_page: One HTML file with everything in it: text, tables, charts and
# what draws them. Whatever a run says is escaped here and nowhere else: `text`, `table` and the
# like take plain text. The page itself forbids the network, and any script but its own, in case
# something slips through.

Html = str  # escaped, ready for the page


class Page:
    """A page that grows from top to bottom."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[Html] = []
        self._charts: list[str] = []

    def heading(self, words: str, level: int = 2) -> None:
        """Add a heading."""
        self._parts.append(f"<h{level}>{escape(words)}</h{level}>")

    def text(self, words: str, style: str = "") -> None:
        """Add paragraphs, one for each line."""
        for line in words.splitlines():
            self._parts.append(f'<p class="{style}">{escape(line)}</p>')

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Add a row of figures, each with what it is."""
        cells = [f"<div><b>{escape(b)}</b><span>{escape(a)}</span></div>" for a, b in facts]
        self._parts.append(f'<div class="facts">{"".join(cells)}</div>')

    def table(self, lines: Sequence[Sequence[str]], *, marked: Sequence[int] = ()) -> None:
        """Add a table, whose first line is its header.

        Args:
            lines: the rows of cells.
            marked: positions of rows, the header not counted, that stand out.
        """
        header = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
        rows = []
        for position, line in enumerate(lines[1:]):
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
            rows.append(f'<tr class="marked">{cells}' if position in marked else f"<tr>{cells}")
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{header}</thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def code(self, lines: str) -> None:
        """Add text as it is typed, or as a file holds it."""
        self._parts.append(f"<pre>{escape(lines)}</pre>")

    def chart(self, figure: go.Figure, label: str, *, width: int = 0) -> None:
        """Add a chart.

        Args:
            figure: what to draw.
            label: what it shows, for who cannot see it.
            width: px that it needs; on a narrower screen it is scrolled.
        """
        style = f' style="min-width:{width}px"' if width else ""
        height = figure.layout.height or 400
        self._parts.append(
            f'<div class="wide"><div class="chart" role="img" aria-label="{escape(label)}"'
            f' data-height="{height:g}"{style}></div></div>'
        )
        self._charts.append(figure.to_json())

    def charts(self, figures: Sequence[tuple[str, go.Figure]]) -> None:
        """Add small charts, as many beside each other as fit."""
        self._parts.append('<div class="grid">')
        for label, figure in figures:
            self.chart(figure, label)
        self._parts.append("</div>")

    def pictures(self, pictures: Sequence[tuple[str, str, str]]) -> None:
        """Add small pictures: a data URI, the words below, and what hovering tells."""
        cells = [
            f'<figure title="{escape(more)}"><img src="{escape(uri)}" alt="{escape(more)}" '
            f"width=56 height=56><figcaption>{escape(words)}</figcaption></figure>"
            for uri, words, more in pictures
        ]
        self._parts.append(f'<div class="pictures">{"".join(cells)}</div>')

    def html(self) -> str:
        """Return the whole page."""
        nonce = secrets.token_urlsafe(16)
        room = files("tune_mnist.reporting") / "assets"
        # Parallel coordinates compile their own drawing code.
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}' 'unsafe-eval'; "
            "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        )
        return "\n".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark">',
                '<link rel="icon" href="data:,">',
                f"<title>{escape(self._title)}</title>",
                f"<style>{(room / 'report.css').read_text(encoding='utf-8')}</style></head>",
                f"<body><main>{''.join(self._parts)}</main>",
                f'<script nonce="{nonce}">{get_plotlyjs()}</script>',
                f'<script nonce="{nonce}">const charts = [{",".join(map(_data, self._charts))}];',
                f"{(room / 'report.js').read_text(encoding='utf-8')}</script></body></html>",
            ]
        )


def _data(chart: str) -> str:
    """Return a figure as JavaScript, without the theme that plotly adds and without a `<`."""
    figure = json.loads(chart)
    figure["layout"].pop("template", None)
    return json.dumps({"data": figure["data"], "layout": figure["layout"]}).replace("<", "\\u003c")


SHOWN_MISTAKES = 80
_LONGEST_NAME = 120  # characters; a file's name has its limits
_AXES_NOTE = "Axes of accuracy are logarithmic in the errors left, so that the top can be seen."


def report_path(runs: Sequence[RunView]) -> Path:
    """Return where a report goes unless told: into the run's folder, or beside the first."""
    first = runs[0].folder.path
    if len(runs) == 1:
        return first / "report.html"
    names = "-".join(run.folder.name for run in runs)
    return first.absolute().parent / f"report-{names[:_LONGEST_NAME]}.html"


def write_report(
    runs: Sequence[RunView], path: Path, *, data_dir: Path | None = None, pictures: bool = True
) -> list[Path]:
    """Write a page about one run, or one that compares several, and return the files written.

    Args:
        runs: one or more, at work or ended, however little there is in them.
        path: of the HTML file.
        data_dir: the folder of MNIST, for the digits that the best model gets wrong.
        pictures: whether to draw the main charts as PNG files as well.

    Raises:
        OSError: it could not be written; an older one is untouched.
    """
    title = " and ".join(run.folder.name for run in runs)
    page = Page(f"{title} · tune_mnist")
    if len(runs) > 1:
        _comparison(page, runs)
    for run in runs:
        _run(page, run, data_dir, alone=len(runs) == 1)
    replace_file(path, page.html())
    return [path, *(write_pictures(runs, path) if pictures else ())]


def _comparison(page: Page, runs: Sequence[RunView]) -> None:
    page.heading(f"{count(len(runs), 'run')} compared", level=1)
    page.text(_how_comparable(runs), "soft")
    lines = [("run", "state", "best", "test there", "baseline, test", "gain", "trials", "epochs")]
    for run in runs:
        best = run.ranked[0].best if run.ranked else None
        baseline = run.baseline.best if run.baseline else None
        lines.append(
            (
                run.folder.name,
                run.state,
                percent(best.accuracy(run.metric)) if best else "-",
                percent(best.test_accuracy) if best else "-",
                percent(baseline.test_accuracy) if baseline else "-",
                points(gain(best, baseline)),
                f"{len(run.history.trials):,}",
                f"{len(run.history.rows):,}",
            )
        )
    page.table(lines)
    for run in runs:
        if (confirmed := read_confirmed(run.folder)) is not None:
            page.text(f"{run.folder.name}: {claim(confirmed)}")
    if any(run.history.rows for run in runs):
        page.heading("Best so far")
        page.text(_AXES_NOTE, "soft")
        page.chart(plots.progress(runs, by_time=False), "best so far against epochs trained")
        page.chart(plots.progress(runs, by_time=True), "best so far against time")


def _how_comparable(runs: Sequence[RunView]) -> str:
    """Say what the runs differ in that makes their accuracies something else."""
    names = [
        name
        for name in ("metric", "epochs", "images")
        if len({str(run.asked.get(name)) for run in runs}) > 1
    ]
    if names:
        return f"Not the same question: the runs differ in {' and '.join(names)}."
    return "The same metric, epochs a trial and training images in all."


def _run(page: Page, run: RunView, data_dir: Path | None, *, alone: bool) -> None:
    page.heading(run.folder.name, level=1)
    page.text(_what_and_when(run), "soft")
    confirmed = read_confirmed(run.folder)
    _verdict(page, run, confirmed)
    if run.history.rows:
        _course(page, run, alone=alone)
        _parameters(page, run)
    _mistakes(page, run, data_dir)
    _settings(page, run)


def _what_and_when(run: RunView) -> str:
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun))
    said = {
        "running": "still running as this was written",
        "interrupted": "interrupted, and can be gone on with",
        "killed": "killed, and can be gone on with",
        "failed": "broken off by an error, and can be gone on with",
    }.get(run.state, run.state)
    return (
        f"A search for hyperparameters of a small MNIST net, begun {begun}, {said}; "
        f"{duration(run.history.elapsed)} of work."
    )


def _verdict(page: Page, run: RunView, confirmed: pd.DataFrame | None) -> None:
    ranked, baseline = run.ranked, run.baseline
    if confirmed is not None:
        page.text(claim(confirmed), "verdict")
    if ranked:
        said = headline(ranked, baseline, len(run.history.trials), run.metric)
        page.text(said.plain, "soft" if confirmed is not None else "verdict")
        best = ranked[0]
        facts = [(f"best {plots.name_of_metric(run.metric)}", percent(best.accuracy(run.metric)))]
        if run.metric != "test_accuracy":
            facts.append(("test accuracy there", percent(best.accuracy("test_accuracy"))))
        if baseline and not ranked[0].is_baseline:
            facts.append(("points above the baseline", points(gain(best.best, baseline.best))))
    else:
        page.text(nothing(run.history), "verdict")
        facts = []
    spent, full = len(run.history.rows), len(run.history.trials) * run.epochs
    facts.append(("trials", f"{len(run.history.trials):,}"))
    if full:
        facts.append((f"epochs, {spent / full:.0%} of all", f"{spent:,}"))
    page.facts([*facts, ("time", duration(run.history.elapsed))])
    page.text(cost(run.history, run.epochs), "soft")
    for line in failures(run.history):
        page.text(line, "bad")
    if ranked:
        page.heading("The best configurations")
        lines = BestTable(ranked, baseline, run.metric).lines()
        base = [i for i, line in enumerate(lines[1:]) if line[1].endswith("(baseline)")]
        page.table(lines, marked=base)
        page.text(
            f"In full in {short_path(run.folder.best)}, all trials in {run.folder.trials.name}.",
            "soft",
        )
    if confirmed is not None:
        page.heading("Confirmed on fresh seeds")
        page.chart(plots.confirmed_winners(confirmed), "means with their 95% intervals")
        page.table(confirmed_lines(confirmed))
        page.text(
            f"{_how_confirmed(run)} At the last epoch, with Student's 95% interval over the "
            "seeds. *The mean of each seed's best epoch is picked on the test set itself, and "
            "so is optimistic.",
            "soft",
        )


def _how_confirmed(run: RunView) -> str:
    asked = confirmation_of(run.folder)
    if asked is None:  # its folder was not kept
        return ""
    images = f"{asked['images']:,}" if asked["images"] else "all"
    seeds = ", ".join(str(seed) for seed in asked["seeds"])
    return f"{count(asked['epochs'], 'epoch')} on {images} training images, seeds {seeds}."


def _course(page: Page, run: RunView, *, alone: bool) -> None:
    page.heading("Learning curves")
    note = ""
    if len(plots.drawn_trials(run)) < len(run.history.trials):
        note = (
            f" {len(plots.drawn_trials(run)):,} of {len(run.history.trials):,} trials are drawn."
        )
    page.text(f"A cross is where ASHA stopped a trial. {_AXES_NOTE}{note}", "soft")
    page.chart(plots.learning_curves(run), "accuracy after every epoch of every trial")
    if alone:
        page.heading("Progress")
        page.chart(plots.progress([run], by_time=False), "best so far against epochs trained")
        page.chart(plots.progress([run], by_time=True), "best so far against time")
    page.heading("Where the budget went")
    page.text(
        "Epochs between the rungs at which trials were stopped, by what became of their trials.",
        "soft",
    )
    page.chart(plots.budget(run), "epochs trained between rungs")
    page.text("The workers' time, were as many there all along as ever worked at once:", "soft")
    page.chart(plots.time_spent(run), "shares of the workers' time")


def _parameters(page: Page, run: RunView) -> None:
    searched = searched_parameters(run.search.get("space"))
    if not searched or not run.ranked:
        return
    page.heading("Hyperparameters")
    page.text(
        "A line for each trial, greener the better; drag along an axis to pick some. A dash is a "
        "parameter that does not count in a trial.",
        "soft",
    )
    width = 62 * (len(searched) + 1) + 100  # px
    page.chart(parallel_coordinates(run, searched), "parallel coordinates", width=width)
    page.heading("What mattered", level=3)
    if shares := importances(run.ranked, searched, run.metric):
        page.text(
            "Each parameter's share in reaching the top tenth (Optuna's PED-ANOVA) by what the "
            "trials reached at their best; those stopped early had less time to.",
            "soft",
        )
        page.chart(importance_bars(shares), "importance of each parameter")
    else:
        page.text(f"It takes {ENOUGH_TRIALS} trials, not all alike, to tell.", "soft")
    page.heading("Each against the best accuracy of a trial", level=3)
    page.text("Star: the best. Diamond: the baseline. Grey: stopped early.", "soft")
    page.charts([(f"{name} against accuracy", f) for name, f in slices(run, searched).items()])


def _mistakes(page: Page, run: RunView, data_dir: Path | None) -> None:
    page.heading("What the best model gets wrong")
    try:
        found = find_mistakes(run.folder, data_dir)
    except TuneMnistError as error:
        page.text(f"Not drawn: {error}.", "soft")
        return
    wrong, images = len(found.wrong), int(found.confusion.sum())
    page.text(
        f"{run.folder.best_model.name}, trial {found.facts.get('trial')} after epoch "
        f"{found.facts.get('epoch')}, reads {images - wrong:,} of {images:,} test digits right "
        f"({percent(1 - wrong / images)}) and {wrong:,} wrong. Below each: what it is, what was "
        "read, how sure; the surest first."
    )
    page.pictures(
        [
            (
                each.png(),
                f"{each.label} → {each.guess} {each.confidence:.0%}",
                f"test image {each.index}: a {each.label}, read as {each.guess} "
                f"with {each.confidence:.1%}",
            )
            for each in found.wrong[:SHOWN_MISTAKES]
        ]
    )
    if wrong > SHOWN_MISTAKES:
        page.text(f"And {wrong - SHOWN_MISTAKES:,} more.", "soft")
    page.chart(confusion(found), "confusion matrix")


def _settings(page: Page, run: RunView) -> None:
    page.heading("To repeat it")
    commands = [repeat_command(run.search)]
    if not run.search.get("confirm") and (asked := confirmation_of(run.folder)) is not None:
        commands.append(repeat_confirmation(run.folder, asked))
    page.code("\n".join(commands))
    page.heading("Settings and versions")
    page.code(yaml.safe_dump(dict(run.search), sort_keys=False, allow_unicode=True))


# MERGED-DOC analysis.repeat: The commands that do a search, and its confirmation, again.

# The command line's own defaults need not be told.
_DEFAULTS = {"metric": "val_accuracy", "time_budget": None, "images": None}


def repeat_command(search: Mapping[str, Any]) -> str:
    """Return the command whose settings a search.yaml holds.

    A time budget is a matter of the machine: with one, another machine comes further or less far.
    """
    source = PurePath(str(search.get("space_source", "")))
    # One of the project's own spaces goes by its name, wherever the project lay.
    space = source.stem if source.parent.name == "search_spaces" else str(source)
    words = ["python", "-m", "tune_mnist.search", "--space", space]
    for name, value in search["asked"].items():
        if value is not None and _DEFAULTS.get(name, _DEFAULTS) != value:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words += ["--" + str(name).replace("_", "-"), shown]
    if search.get("confirm"):
        words.append("--confirm")
    return shlex.join(words)


def confirmation_of(folder: RunFolder) -> Mapping[str, Any] | None:
    """Return what was asked of a run's confirmation; None where none can be read."""
    try:
        found = RunFolder(folder.path / "confirm").read_search()["confirmation"]
        known = {"epochs": int, "images": int | None, "seeds": list, "configurations": list}
        is_whole = all(isinstance(found[name], kind) for name, kind in known.items())
    except (RunFolderError, KeyError, TypeError):
        return None
    return found if is_whole else None


def repeat_confirmation(folder: RunFolder, asked: Mapping[str, Any]) -> str:
    """Return the command that confirmed a run's winners."""
    words = ["python", "-m", "tune_mnist.confirm", short_path(folder.path)]
    words += ["--top", f"{len(asked['configurations']) - 1}"]
    words += ["--seeds", f"{len(asked['seeds'])}", "--epochs", f"{asked['epochs']}"]
    if asked["images"] is not None:
        words += ["--images", f"{asked['images']}"]
    return shlex.join(words)
