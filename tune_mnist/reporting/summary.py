"""What a search says when it ends: the winner, what it gained, what it cost, where the files are.

rich.console.Console().print(summary(folder, history, "val_accuracy", epochs=20))
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tune_mnist.mnist.config import CONFIG_FIELDS
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.confirmed import CONFIDENCE
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.formatting import count, duration, percent, points, setting, short_path
from tune_mnist.runs.history import History, State, TrialRecord
from tune_mnist.runs.ranking import RankedTrial, gain, rank_by_best, standings
from tune_mnist.runs.view import RunState, RunView, find_runs

ROWS = 5
ENDS: tuple[State, ...] = ("complete", "stopped", "diverged", "failed")
_TEST_IMAGES = 10_000
# Standard deviations that chance stays within, 95 times of 100.
_SURE = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def summary(folder: RunFolder, history: History, metric: Metric, *, epochs: int) -> Group:
    """Return what there is to say of a search; rich prints it, as plain text where no terminal is.

    Args:
        folder: where the run's files are.
        history: what happened.
        metric: what the search selected by.
        epochs: the budget of a trial.
    """
    trials = standings(history, metric)
    ranked = rank_by_best(trials, metric)
    baseline = next((each for each in trials if each.is_baseline), None)
    parts: list[RenderableType] = [Text("")]
    if ranked:
        parts.append(headline(ranked, baseline, len(trials), metric))
        parts += [Text(""), BestTable(ranked, baseline, metric), Text("")]
    else:
        parts.append(Text(nothing(history), style="bold"))
    parts.append(Text(cost(history, epochs)))
    parts += [Text(line, style="red") for line in failures(history)]
    parts.append(Text(_files(folder)))
    return Group(*parts)


@dataclass(frozen=True)
class BestTable:
    """The best configurations and the baseline, each a row or, where that is too wide, a column.

    Of the hyperparameters only those are shown in which the shown trials or the baseline differ.
    """

    ranked: list[RankedTrial]
    baseline: RankedTrial | None
    metric: Metric

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay the table out for the width that there is."""
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
        shown = list(enumerate(self.ranked, start=1))[:ROWS]
        shown += [pair for pair in enumerate(self.ranked, start=1) if pair[1].is_baseline][:1]
        shown = list(dict(shown).items())  # the baseline once
        configs = [each.record.config for _, each in shown]
        compared = [*configs, self.baseline.record.config] if self.baseline else configs
        names = [
            name
            for name in CONFIG_FIELDS
            if len({str(getattr(config, name)) for config in compared}) > 1
        ]
        held_out = ("val accuracy",) if self.metric == "val_accuracy" else ()
        lines = [("rank", "trial", *held_out, "test accuracy", "gain", "at epoch", *names)]
        for rank, each in shown:
            values = ([percent(each.accuracy("val_accuracy"))] if held_out else []) + [
                percent(each.accuracy("test_accuracy")),
                points(gain(each.best, self.baseline.best if self.baseline else None)),
                f"{each.best.epoch if each.best else 0}",
                *(setting(each.record.config, name) for name in names),
            ]
            trial = f"{each.record.number}"
            lines.append(
                (str(rank), f"{trial} (baseline)" if each.is_baseline else trial, *values)
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
    """Say which trial was the best, what it gained and how far that can be believed."""
    winner = ranked[0]
    first = f"Best of {count(trials, 'trial')}: trial {winner.record.number}"
    if winner.is_baseline and trials > 1:
        first = f"Of {trials:,} trials none was better than the baseline"
    text = Text.assemble((first, "bold"), f", {_accuracies(winner, metric)}.\n")
    if not winner.is_baseline:
        text.append(f"{_against(winner, baseline, metric)}\n")
    if metric == "test_accuracy":
        text.append("Picked on the test set, so the winner's accuracy there flatters it. ")
    else:
        text.append("Picked on held-out training images; the test set steered nothing. ")
    # As between two accuracies, each measured on so many other images.
    accuracy = winner.accuracy("test_accuracy")
    chance = _SURE * math.sqrt(2 * accuracy * (1 - accuracy) / _TEST_IMAGES)
    text.append(f"One seed each: differences up to about {100 * chance:.1f} points may be chance")
    alike = _alike(ranked, baseline, chance)
    text.append(f", so it cannot be told from {' or '.join(alike)}." if alike else ".")
    return text


def _alike(ranked: list[RankedTrial], baseline: RankedTrial | None, chance: float) -> list[str]:
    """Name who is as near to the winner as chance comes: the baseline, the runner-up."""
    winner = ranked[0]
    rivals = {f"trial {each.record.number}": each for each in ranked[1:] if not each.is_baseline}
    rivals = dict(list(rivals.items())[:1])
    if baseline is not None and not winner.is_baseline:
        rivals = {"the baseline": baseline, **rivals}
    return [name for name, each in rivals.items() if abs(gain(winner.best, each.best)) <= chance]


def _against(winner: RankedTrial, baseline: RankedTrial | None, metric: Metric) -> str:
    if baseline is None or baseline.best is None:
        return "The baseline has no epoch to compare with."
    so_far = " so far" if baseline.record.state == "running" else ""
    return (
        f"The baseline{so_far}: {_accuracies(baseline, metric)}. "
        f"Gain on the test set: {points(gain(winner.best, baseline.best))} points."
    )


def _accuracies(standing: RankedTrial, metric: Metric) -> str:
    epoch = standing.best.epoch if standing.best else 0
    test = percent(standing.accuracy("test_accuracy"))
    if metric == "test_accuracy":
        return f"test accuracy {test} at epoch {epoch}"
    val = percent(standing.accuracy("val_accuracy"))
    return f"val accuracy {val}, test {test} at epoch {epoch}"


def nothing(history: History) -> str:
    """Say what there was in place of a best trial."""
    if not history.trials:
        return "No trial was started."
    return f"None of {count(len(history.trials), 'trial')} finished an epoch to be judged by."


def cost(history: History, epochs: int) -> str:
    """Say how many trials came to what, and what all of them took."""
    states = Counter(record.state for record in history.trials.values())
    counts = [f"{states[state]:,} {state}" for state in ENDS]
    if states["running"]:
        counts.append(f"{states['running']:,} broken off, to be gone on with")
    text = f"Trials: {', '.join(counts)}; {duration(history.elapsed)} in all."
    full = len(history.trials) * epochs
    if full:
        spent = len(history.rows)
        text += (
            f"\nEpochs: {spent:,} of the {full:,} that training all of them to the end "
            f"takes ({spent / full:.0%})."
        )
    return text


def failures(history: History) -> list[str]:
    """Say what failed or diverged, a line for each of the two."""
    lines = []
    for state in ("failed", "diverged"):
        trials: list[TrialRecord] = [r for r in history.trials.values() if r.state == state]
        if trials:
            which = "" if len(trials) == 1 else "the first, "
            first = trials[0]
            lines.append(f"{len(trials):,} {state}; {which}trial {first.number}: {first.reason}")
    return lines


def _files(folder: RunFolder) -> str:
    paths = (folder.best, folder.trials, folder.epochs, folder.study, folder.best_model)
    there = [path.name for path in paths if path.exists()]
    return f"In {short_path(folder.path)}: {', '.join(there) or 'nothing yet'}"


# MERGED-DOC analysis.listing: The runs in a folder of results, as a table.
# rich.console.Console().print(listing(Path("results")))

_STYLES: dict[RunState, str] = {"running": "green", "killed": "red", "failed": "red"}


def listing(results: Path) -> Group:
    """Return the runs, the newest first, each with its state, its best and when it began."""
    runs, errors = find_runs(results)
    parts: list[RenderableType] = []
    if runs:
        parts.append(_listing_table(runs))
    else:
        parts.append(Text(f"No run in {short_path(results)}."))
    parts += [Text(f"warning: {error}") for error in errors]
    return Group(*parts)


def _listing_table(runs: list[RunView]) -> Table:
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
            "-" if best is None else percent(best.accuracy(run.metric)),
            "-" if best is None else percent(best.test_accuracy),
            duration(run.history.elapsed),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun)),
        )
    return table


def _asked(run: RunView) -> str:
    trials = run.asked.get("trials")
    return f"{trials:,}" if isinstance(trials, int) else "?"
