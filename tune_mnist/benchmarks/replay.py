"""`bench replay`: whole searches over recorded learning curves, hundreds of them in minutes.

A search's regret is what the configuration that it would hand over loses, in test accuracy at the
end of its training, on the best recorded one. It picks as a real search does: the highest
validation accuracy seen so far, of equals the lower loss.
"""

import itertools
import logging
import math
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from tune_mnist.benchmarks.measurements import Measurements, json_line, usable_cores, write_file
from tune_mnist.benchmarks.rank_correlations import rank_correlations
from tune_mnist.benchmarks.recorded_curves import RecordedCurves, read_curves
from tune_mnist.benchmarks.replay_line_up import OURS, LineUp, line_up
from tune_mnist.benchmarks.replay_systems import Search
from tune_mnist.cli import tell
from tune_mnist.runs.confirmed import interval
from tune_mnist.runs.space import load_space

CHUNK = 25  # searches that a process runs in one go
AtLeast1 = Parameter(validator=Number(gte=1))


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Replay searches over recorded curves: the regret of their pick against epochs spent."""

    curves: Path = Path("results/bench/curves.csv")
    """What `bench curves` has recorded."""

    compare: LineUp = "systems"
    """systems: ours and what others do. stopping, sampling: ours with other settings."""

    repetitions: Annotated[int, AtLeast1] = 300
    """Searches of each kind, from different seeds."""

    budgets: tuple[Annotated[int, AtLeast1], ...] = (40, 60, 100, 150)
    """Epochs spent, in all trials together, at which a search is asked for its pick."""

    at_once: Annotated[int, AtLeast1] = 4
    """Trials at once."""

    space: str = "default"
    """The space that the curves were drawn from."""

    save: Path | None = None
    """Write every number to this CSV file."""


@dataclass(frozen=True)
class Replay:
    """A number of searches of one kind."""

    settings: ReplaySettings
    name: str
    seeds: Sequence[int]


def replay(settings: ReplaySettings) -> None:
    """Replay and print."""
    tell(rank_correlations(read_curves(settings.curves)))
    entries = line_up(settings.compare)
    seeds = range(settings.repetitions)
    work = [
        Replay(settings, name, seeds[first : first + CHUNK])
        for name in entries
        for first in range(0, len(seeds), CHUNK)
    ]
    taken = Measurements("replay")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(usable_cores(), mp_context=context) as pool:
        for each, regrets in zip(work, pool.map(regrets_of, work), strict=True):
            for regret in regrets:
                for budget, value in zip(settings.budgets, regret, strict=True):
                    taken.add(each.name, f"regret_at_{budget}", value)
    tell(_table(taken, settings, list(entries)))
    if settings.save is not None:
        write_file(settings.save, taken.csv())
    tell(json_line({"part": "replay", **_keys(taken, settings, list(entries))}))


def regrets_of(work: Replay) -> list[list[float]]:
    """Run the searches and return each one's regret at the budgets."""
    # Ray warns of each loss that is NaN, and NumPy of ASHA's rungs that hold nothing else.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "All-NaN slice encountered")
    settings, entry = work.settings, line_up(work.settings.compare)[work.name]
    space = load_space(settings.space)
    table = read_curves(settings.curves)
    raw = RecordedCurves.of(table, space, "raw")
    averaged = RecordedCurves.of(table, space, "averaged")
    best = max(raw.test_accuracy.max(), averaged.test_accuracy.max())
    curves = averaged if entry.weights == "averaged" else raw
    return [
        [
            float(best - curves.test_accuracy[pick])
            for pick in picks(
                entry.build(space, curves.epochs, seed), curves, settings.budgets, settings.at_once
            )
        ]
        for seed in work.seeds
    ]


def picks(
    search: Search, curves: RecordedCurves, budgets: Sequence[int], at_once: int
) -> list[int]:
    """Run one search and return what it would hand over at each budget, a row of the curves."""
    pick, best = 0, (-math.inf, -math.inf)
    found = []
    for row, epoch in islice(epochs_of(search, curves, at_once), max(budgets)):
        score = (curves.val_accuracy[row, epoch - 1], -curves.val_loss[row, epoch - 1])
        if score > best:  # false where the epoch diverged
            pick, best = row, score
        found.append(pick)
    # A search that has run through all that is recorded stays with its pick.
    return [found[min(budget, len(found)) - 1] for budget in budgets]


def epochs_of(search: Search, curves: RecordedCurves, at_once: int) -> Iterator[tuple[int, int]]:
    """Yield every epoch that a search spends: the row of the curves and the epoch, from 1.

    `at_once` trials take turns, an epoch each; one that ends makes room for the next. A recorded
    configuration is trained once: what is proposed next to it is then the next nearest.
    """
    running: list[Trial] = []
    taken: set[int] = set()
    started = itertools.count()
    while True:
        while len(running) < at_once and len(taken) < len(curves.configs):
            number = next(started)
            row = curves.nearest(search.propose(number), taken)
            taken.add(row)
            running.append(Trial(number, row))
        if not running:
            return
        for trial in list(running):
            trial.epoch += 1
            value = float(curves.val_accuracy[trial.row, trial.epoch - 1])
            stop = search.report(trial.number, trial.epoch, value)
            yield trial.row, trial.epoch
            complete = trial.epoch >= curves.epochs
            if stop or complete:
                search.end(trial.number, value, complete=complete)
                running.remove(trial)


@dataclass
class Trial:
    """A replayed trial on its way."""

    number: int
    row: int  # of the curves
    epoch: int = 0  # finished


def _table(taken: Measurements, settings: ReplaySettings, names: Sequence[str]) -> str:
    """Draw each search's mean regret at the budgets, in points, with its 95% interval."""
    header = "".join(f"{f'{budget} epochs':>24}" for budget in settings.budgets)
    lines = [f"{'regret, percentage points':<32}{header}"]
    for name in names:
        cells = [_cell(taken.values(name, f"regret_at_{budget}")) for budget in settings.budgets]
        lines.append(f"{name:<32}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(regrets: Sequence[float]) -> str:
    mean, low, high = interval([100 * regret for regret in regrets])
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _keys(
    taken: Measurements, settings: ReplaySettings, names: Sequence[str]
) -> dict[str, object]:
    """Return mean regrets, and by how much others' exceed ours, paired by seed."""
    budget = f"regret_at_{max(settings.budgets)}"
    ours = taken.values(OURS, budget)
    behind = {}
    for name in names:
        pairs = zip(taken.values(name, budget), ours, strict=True)
        behind[name] = dict(
            zip(("mean", "low", "high"), interval([a - b for a, b in pairs]), strict=True)
        )
    return {
        "regret": {name: interval(taken.values(name, budget))[0] for name in names},
        "behind_ours": behind,
        "epochs": max(settings.budgets),
        "n": settings.repetitions,
    }
