"""The text at a search's end (winner, gain, cost, files), and the table of past runs.

console.print(summary(folder, history, "val_accuracy", epochs=20))
console.print(Listing(Path("results")), crop=False)
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from tune_mnist.mnist.config import CONFIG_FIELDS
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.confirmed import CONFIDENCE
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, percent, points, setting, short_path
from tune_mnist.runs.history import ENDS, History, Origin
from tune_mnist.runs.ranking import RankedTrial, baseline_of, gain, rank_by_best, ranked_trials
from tune_mnist.runs.view import RunState, RunView, find_runs

ROWS = 5
_ORIGINS: dict[Origin, str] = {
    "baseline": "the baseline",
    "start": "a known good point of the space's start list",
    "sampled": "found by the search",
}
_MARKS: dict[Origin, str] = {"baseline": " (baseline)", "start": " (given)", "sampled": ""}
_TEST_IMAGES = 10_000
# Standard deviations that chance stays within, 95 times of 100.
_SURE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
_STYLES: dict[RunState, str] = {"running": "green", "killed": "red", "failed": "red"}


def summary(folder: RunFolder, history: History, metric: Metric, *, epochs: int) -> Group:
    """Return the summary of a search by its metric and its budget of epochs per trial, for rich.

    Without a terminal it is plain text.
    """
    trials = ranked_trials(history, metric)
    ranked, baseline = rank_by_best(trials, metric), baseline_of(trials)
    parts: list[RenderableType] = [Text("")]
    if ranked:
        parts.append(headline(ranked, baseline, len(trials), metric))
        parts += [Text(""), BestTable(ranked, baseline, metric), Text("")]
    else:
        parts.append(Text(no_best(history), style="bold"))
    parts.append(Text(cost(history, epochs)))
    parts += [Text(line, style="red") for line in failures(history)]
    files = (folder.best, folder.trials, folder.epochs, folder.study, folder.best_model)
    found = ", ".join(path.name for path in files if path.exists())
    parts.append(Text(f"In {short_path(folder.path)}: {found or 'nothing yet'}"))
    return Group(*parts)


@dataclass(frozen=True)
class BestTable:
    """The best configurations and the baseline, each a row or, if that is too wide, a column.

    Only those hyperparameters are shown in which the shown trials or the baseline differ.
    """

    ranked: list[RankedTrial]
    baseline: RankedTrial | None
    metric: Metric

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self.lines()
        by_rows = _table(lines[0], lines[1:])
        roomy = options.update(max_width=10_000)
        if Measurement.get(console, roomy, by_rows).maximum <= options.max_width:
            yield by_rows
        else:
            turned = list(zip(*lines, strict=True))
            yield _table(turned[0], turned[1:])

    def lines(self) -> list[tuple[str, ...]]:
        """Return the table's rows as text, the header first."""
        shown = [
            (rank, trial)
            for rank, trial in enumerate(self.ranked, start=1)
            if rank <= ROWS or trial.is_baseline
        ]
        compared = [trial for _, trial in shown] + ([self.baseline] if self.baseline else [])
        settings = [trial.record.config.as_dict() for trial in compared]
        names = [name for name in CONFIG_FIELDS if len({str(each[name]) for each in settings}) > 1]
        held_out = ("val accuracy",) if self.metric == "val_accuracy" else ()
        lines = [("rank", "trial", *held_out, "test accuracy", "gain", "at epoch", *names)]
        for rank, trial in shown:
            lines.append(
                (
                    str(rank),
                    f"{trial.record.number}{_MARKS[trial.record.origin]}",
                    *(percent(trial.accuracy("val_accuracy")) for _ in held_out),
                    percent(trial.accuracy("test_accuracy")),
                    points(gain(trial.best, self.baseline.best if self.baseline else None)),
                    f"{trial.best.epoch if trial.best else 0}",
                    *(setting(trial.record.config, name) for name in names),
                )
            )
        return lines


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(header[0], style="bold" if header[1].isdigit() else "")
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def headline(
    ranked: list[RankedTrial], baseline: RankedTrial | None, trials: int, metric: Metric
) -> Text:
    """Return which trial is best, what it gains and how much of that may be chance."""
    winner = ranked[0]
    origin = _ORIGINS[winner.record.origin]
    first = f"Best of {count(trials, 'trial')}: trial {winner.record.number}, {origin}"
    if winner.is_baseline and trials > 1:
        first = f"Of {trials:,} trials none was better than the baseline"
    text = Text.assemble((first, "bold"), f", {_accuracies(winner, metric)}.\n")
    if not winner.is_baseline:
        text.append(f"{_against(winner, baseline, metric)}{_against_start(ranked)}\n")
    if metric == "test_accuracy":
        text.append("Picked on the test set, so the winner's accuracy there flatters it. ")
    else:
        text.append("Picked on held-out training images; the test set steered nothing. ")
    # The standard error of a difference of two accuracies, each measured on that many images.
    accuracy = winner.accuracy("test_accuracy")
    chance = _SURE * math.sqrt(2 * accuracy * (1 - accuracy) / _TEST_IMAGES)
    text.append(f"One seed each: differences up to about {100 * chance:.1f} points may be chance")
    alike = _alike(ranked, baseline, chance)
    text.append(f", so it cannot be told from {' or '.join(alike)}." if alike else ".")
    return text


def _alike(ranked: list[RankedTrial], baseline: RankedTrial | None, chance: float) -> list[str]:
    """Name those of the baseline and the runner-up that are within chance of the winner."""
    winner = ranked[0]
    rivals: list[tuple[str, RankedTrial]] = []
    if baseline is not None and not winner.is_baseline:
        rivals.append(("the baseline", baseline))
    runners_up = [trial for trial in ranked[1:] if not trial.is_baseline]
    rivals += [(f"trial {trial.record.number}", trial) for trial in runners_up[:1]]
    return [name for name, rival in rivals if abs(gain(winner.best, rival.best)) <= chance]


def _against(winner: RankedTrial, baseline: RankedTrial | None, metric: Metric) -> str:
    if baseline is None:
        return "The baseline has not begun, so there is nothing to compare with."
    if baseline.best is None:
        return "The baseline has no epoch to compare with."
    so_far = " so far" if baseline.record.state == "running" else ""
    return (
        f"The baseline{so_far}: {_accuracies(baseline, metric)}. "
        f"Gain on the test set: {points(gain(winner.best, baseline.best))} points."
    )


def _against_start(ranked: list[RankedTrial]) -> str:
    """Return what a winner that the search found gains over the best start point."""
    winner = ranked[0]
    points_tried = [trial for trial in ranked if trial.record.origin == "start"]
    if not points_tried or points_tried[0] is winner:
        return ""
    best = points_tried[0]
    return (
        f" Over trial {best.record.number}, the best known good point: "
        f"{points(gain(winner.best, best.best))} points."
    )


def _accuracies(trial: RankedTrial, metric: Metric) -> str:
    epoch = trial.best.epoch if trial.best else 0
    test = percent(trial.accuracy("test_accuracy"))
    if metric == "test_accuracy":
        return f"test accuracy {test} at epoch {epoch}"
    val = percent(trial.accuracy("val_accuracy"))
    return f"val accuracy {val}, test {test} at epoch {epoch}"


def no_best(history: History) -> str:
    if not history.trials:
        return "No trial was started."
    return f"None of {count(len(history.trials), 'trial')} finished an epoch that counts."


def cost(history: History, epochs: int) -> str:
    """Return the trials by their final state, and the time and epochs they took, in two lines."""
    states = Counter(record.state for record in history.trials.values())
    counts = [f"{states[state]:,} {state}" for state in ENDS]
    if states["running"]:
        counts.append(f"{states['running']:,} interrupted, to be resumed")
    text = f"Trials: {', '.join(counts)}; {duration(history.elapsed)} in all."
    if full := len(history.trials) * epochs:
        spent = len(history.rows)
        text += (
            f"\nEpochs: {spent:,} of the {full:,} that training all of them to the end "
            f"takes ({spent / full:.0%})."
        )
    return text


def failures(history: History) -> list[str]:
    """Return a line about the trials that failed, and one about those that diverged."""
    lines = []
    for state in ("failed", "diverged"):
        trials = [record for record in history.trials.values() if record.state == state]
        if trials:
            first, which = trials[0], "" if len(trials) == 1 else "the first, "
            lines.append(f"{len(trials):,} {state}; {which}trial {first.number}: {first.reason}")
    return lines


@dataclass(frozen=True)
class Listing:
    """The runs in a folder of results, newest first, and what is wrong with the others.

    Where a table is too wide, each run's name has a line of its own: no name or path is broken.
    """

    results: Path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        runs, errors = find_runs(self.results)
        if runs:
            names = [Text(run.folder.name, no_wrap=True, overflow="ignore") for run in runs]
            table = _runs_table(runs, names)
            roomy = options.update(max_width=10_000)
            if Measurement.get(console, roomy, table).maximum <= options.max_width:
                yield table
            else:
                yield from _below(names, console.render_lines(_runs_table(runs), options))
        else:
            yield Text(f"No run in {short_path(self.results)}.")
        for error in errors:
            yield Text(f"damaged: {error}", no_wrap=True, overflow="ignore")


def _below(names: list[Text], lines: list[list[Segment]]) -> RenderResult:
    """Return a table's lines, the header first, each of the others below its run's name."""
    header, *rest = lines
    yield Segments([*header, Segment.line()])
    for name, line in zip(names, rest, strict=True):
        yield name
        yield Segments([*line, Segment.line()])


def _runs_table(runs: list[RunView], names: list[Text] | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    if names:
        table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("trials", "best", "test", "took", "begun"):
        table.add_column(name, justify="right", no_wrap=True)
    for position, run in enumerate(runs):
        done = len(run.history.trials) - len(run.history.unfinished())
        asked = "?" if run.asked.trials is None else f"{run.asked.trials:,}"
        table.add_row(
            *(names[position : position + 1] if names else ()),
            Text(run.state, style=_STYLES.get(run.state, "")),
            f"{done:,}/{asked}",
            percent(run.best.accuracy(run.metric)) if run.best else "-",
            percent(run.best.accuracy("test_accuracy")) if run.best else "-",
            duration(run.history.elapsed),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun)),
        )
    return table
