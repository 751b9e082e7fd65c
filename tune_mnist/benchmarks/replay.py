"""`bench replay`: whole searches over recorded learning curves, hundreds of them in minutes.

A search's regret is what the configuration that it would hand over loses, in test accuracy at the
end of its training, on the best recorded one. It picks as a real search does: the highest
validation accuracy seen so far, of equals the lower loss. A proposal is replaced by the nearest
recorded configuration.

First comes how well a young trial's rank predicts its end: Spearman's rank correlation between the
validation accuracy after a few epochs and the test accuracy after the last one, over the
configurations of one schedule and over all.
"""

import logging
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from optuna.distributions import CategoricalDistribution

from tune_mnist.benchmarks.measurements import Measurements, usable_cores
from tune_mnist.benchmarks.replay_systems import OURS, Search, Weights, line_up
from tune_mnist.benchmarks.settings import ReplaySettings
from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import CONFIG_FIELDS, TrainConfig
from tune_mnist.runs.confirmed import interval
from tune_mnist.runs.parameter import Parameter
from tune_mnist.runs.space import SearchSpace, load_space

CHUNK = 25  # searches that a process is given at a time
PREFIX: dict[Weights, str] = {"raw": "", "averaged": "averaged_"}
SCORES = ("val_accuracy", "val_loss", "test_accuracy")
YOUNG = (1, 3, 9)  # epochs: the rungs of ASHA with a factor of 3
CHANCE = 0.1  # accuracy of a guess among ten digits
BELOW_RANGE = -0.2  # where 0 lies on the scale of a range that lacks it
OTHER_KIND = 1000.0  # more than any distance between two configurations of one kind

Floats = npt.NDArray[np.float64]


def replay(settings: ReplaySettings) -> None:
    tell(rank_correlations(read_curves(settings.curves)))
    load_space(settings.drawn_from)  # refused here, not by each of the processes
    names = list(line_up(settings.compare))
    searches = [(name, seed) for name in names for seed in range(settings.repetitions)]
    measured = Measurements("replay")
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        found = pool.map(partial(regrets, settings), searches, chunksize=CHUNK)
        for (name, _), values in zip(searches, found, strict=True):
            for budget, regret in zip(settings.budgets, values, strict=True):
                measured.add(name, f"regret_at_{budget}", regret)
    table = _table(measured, settings, names)
    measured.finish(_keys(measured, settings, names), settings.save, table)


def regrets(settings: ReplaySettings, search: tuple[str, int]) -> list[float]:
    """Run one search, given by its name and seed, and return its regret at the budgets."""
    # Ray warns of each loss that is NaN, and NumPy of ASHA's rungs that hold nothing else.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "All-NaN slice encountered")
    name, seed = search
    entry = line_up(settings.compare)[name]
    space, known = _load(settings.drawn_from, settings.curves)
    curves = known[entry.weights]
    best = max(each.test_accuracy.max() for each in known.values())
    running = entry.build(space, curves.epochs, seed)
    found = picks(running, curves, settings.budgets, settings.at_once)
    return [float(best - curves.test_accuracy[pick]) for pick in found]


@cache
def _load(space: str, path: Path) -> "tuple[SearchSpace, dict[Weights, RecordedCurves]]":
    """Load, once in each process, what all searches replay on."""
    loaded, table = load_space(space), read_curves(path)
    return loaded, {weights: RecordedCurves.of(table, loaded, weights) for weights in PREFIX}


def picks(
    search: Search, curves: "RecordedCurves", budgets: Sequence[int], at_once: int
) -> list[int]:
    """Run one search and return what it would hand over at each budget, a row of the curves."""
    pick, best = 0, (-math.inf, -math.inf)
    found = []
    for row, epoch in islice(epochs_of(search, curves, at_once), max(budgets)):
        score = (curves.val_accuracy[row, epoch - 1], -curves.val_loss[row, epoch - 1])
        if score > best:  # false where the epoch diverged
            pick, best = row, score
        found.append(pick)
    # A search that has used up all recorded curves keeps its pick.
    return [found[min(budget, len(found)) - 1] for budget in budgets]


def epochs_of(search: Search, curves: "RecordedCurves", at_once: int) -> Iterator[tuple[int, int]]:
    """Yield every epoch that a search spends: the row of the curves and the epoch, from 1.

    `at_once` trials take turns, an epoch each; one that ends makes room for the next. A recorded
    configuration is trained once: the next proposal near it gets the next nearest.
    """
    running: dict[int, int] = {}  # a trial's number: its row of the curves
    epochs: Counter[int] = Counter()  # finished, by the trial's number
    taken: set[int] = set()
    while True:
        while len(running) < at_once and len(taken) < len(curves.configs):
            number = len(taken)
            running[number] = curves.nearest(search.propose(number), taken)
            taken.add(running[number])
        if not running:
            return
        for number, row in list(running.items()):
            epochs[number] += 1
            epoch = epochs[number]
            value = float(curves.val_accuracy[row, epoch - 1])
            stop = search.report(number, epoch, value)
            yield row, epoch
            complete = epoch >= curves.epochs
            if stop or complete:
                search.end(number, value, complete=complete)
                del running[number]


def read_curves(path: Path) -> pd.DataFrame:
    """Return the recorded rows, one a configuration and epoch, or raise ConfigError."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--curves: cannot read {path} ({error}): python -m tune_mnist.bench curves makes it"
        ) from error
    scores = {f"{prefix}{column}" for prefix in PREFIX.values() for column in SCORES}
    needed = {"config", "epoch", "config_schedule"} | scores
    if missing := needed - set(table.columns):
        raise ConfigError(f"--curves: {path} has no column {min(missing)}: not recorded curves")
    return table


@dataclass(frozen=True)
class RecordedCurves:
    """Whole curves of N configurations over E epochs, scored with one kind of weights.

    A configuration that diverged has NaN from there on.
    """

    space: SearchSpace
    configs: list[TrainConfig]
    val_accuracy: Floats  # [N, E]
    val_loss: Floats  # [N, E]
    test_accuracy: Floats  # [N], after the last epoch; that of a guess if it diverged
    _places: Floats  # [N, D]: each configuration in a unit cube, NaN where inactive

    @classmethod
    def of(cls, table: pd.DataFrame, space: SearchSpace, weights: Weights) -> Self:
        """Take the curves of one kind of weights out of the recorded rows."""
        prefix = PREFIX[weights]
        test = _by_epoch(table, f"{prefix}test_accuracy").to_numpy()[:, -1]
        firsts = table.sort_values(["config", "epoch"]).drop_duplicates("config")
        names = {f"config_{name}": name for name in CONFIG_FIELDS}
        rows: Any = firsts.filter(items=list(names)).rename(columns=names).to_dict("records")
        configs = [TrainConfig.from_mapping(row) for row in rows]
        return cls(
            space,
            configs,
            _by_epoch(table, f"{prefix}val_accuracy").to_numpy(),
            _by_epoch(table, f"{prefix}val_loss").to_numpy(),
            np.where(np.isnan(test), CHANCE, test),
            np.array([_place(space, config) for config in configs]),
        )

    @property
    def epochs(self) -> int:
        return int(self.val_accuracy.shape[1])

    def nearest(self, config: TrainConfig, taken: Collection[int] = ()) -> int:
        """Return the recorded configuration, none of `taken`, that stands in for `config`.

        It has the same values of the parameters on which conditions depend (optimizer and
        schedule), where any has, and is the nearest in the numbers, each scaled to its range.
        """
        # NaN where it is inactive in the one or the other, as with another optimizer or schedule.
        distances = np.nan_to_num(self._places - _place(self.space, config))
        parameters = self.space.parameters
        parents = {name for parameter in parameters.values() for name in parameter.when}
        columns = [column for column, name in enumerate(parameters) if name in parents]
        other = (distances[:, columns] != 0).any(axis=1)
        cost = (distances**2).sum(axis=1) + OTHER_KIND * other
        cost[list(taken)] = np.inf
        return int(np.argmin(cost))


def _by_epoch(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column as [N, E], NaN after a curve's last row."""
    return table.pivot(index="config", columns="epoch", values=column)


def _place(space: SearchSpace, config: TrainConfig) -> Floats:
    """Return where a configuration lies, each searched parameter on a scale from 0 to 1, [D]."""
    values = config.as_dict()
    place = [
        _scaled(parameter, values[name]) if parameter.active(values) else np.nan
        for name, parameter in space.parameters.items()
    ]
    return np.array(place)


def _scaled(parameter: Parameter, value: object) -> float:
    distribution: Any = parameter.distribution
    if parameter.or_zero and value == 0:
        return BELOW_RANGE
    internal: float = distribution.to_internal_repr(value)
    if isinstance(distribution, CategoricalDistribution):
        return internal  # equal or a whole step apart
    low, high = distribution.low, distribution.high
    if distribution.log:
        internal, low, high = np.log(internal), np.log(low), np.log(high)
    return float((internal - low) / (high - low)) if high > low else 0.0


def rank_correlations(curves: pd.DataFrame) -> str:
    """Return a line for each schedule and each kind of weights that `bench curves` recorded."""
    rows = {}
    for schedule in ("all", *sorted(curves["config_schedule"].unique())):
        chosen = curves if schedule == "all" else curves[curves["config_schedule"] == schedule]
        for weights, prefix in PREFIX.items():
            values = _by_epoch(chosen, f"{prefix}val_accuracy")
            final = _by_epoch(chosen, f"{prefix}test_accuracy").iloc[:, -1]
            found = values.reindex(columns=YOUNG).corrwith(final, method="spearman")
            rows[f"{schedule} {weights}"] = [*found, str(len(values))]
    columns = [*(f"epoch {epoch}" for epoch in YOUNG), "n"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table = table.rename_axis(columns="rank correlation with the end")
    return f"{table.to_string(float_format='%.2f')}\n{_gain(curves)}"


def _gain(curves: pd.DataFrame) -> str:
    end = curves.dropna(subset=["test_accuracy", "averaged_test_accuracy"])
    gains = 100 * (end["averaged_test_accuracy"] - end["test_accuracy"])
    mean, low, high = interval(gains.tolist())
    return (
        f"averaged weights end {mean:.2f} points above the raw (95% interval {low:.2f} to "
        f"{high:.2f}, n = {len(gains)}); median {gains.median():.2f}"
    )


def _table(measured: Measurements, settings: ReplaySettings, names: list[str]) -> str:
    """Return each search's mean regret at the budgets, in points, with its 95% interval."""
    cells = {
        f"{budget} epochs": [_cell(measured.values(name, f"regret_at_{budget}")) for name in names]
        for budget in settings.budgets
    }
    table = pd.DataFrame(cells, index=pd.Index(names))
    return str(table.rename_axis(columns="regret, percentage points").to_string())


def _cell(regrets: Sequence[float]) -> str:
    mean, low, high = interval([100 * regret for regret in regrets])
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _keys(measured: Measurements, settings: ReplaySettings, names: list[str]) -> dict[str, object]:
    """Return mean regrets, and by how much others' exceed ours, paired by seed."""
    quantity = f"regret_at_{max(settings.budgets)}"
    regrets = {name: np.array(measured.values(name, quantity)) for name in names}
    behind = {name: interval((regrets[name] - regrets[OURS]).tolist()) for name in names}
    return {
        "regret": {name: float(values.mean()) for name, values in regrets.items()},
        "behind_ours": {
            name: {"mean": mean, "low": low, "high": high}
            for name, (mean, low, high) in behind.items()
        },
        "epochs": max(settings.budgets),
        "n": settings.repetitions,
    }
