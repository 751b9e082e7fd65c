"""The searches that `bench replay` compares: who proposes, who stops, each from its own library.

What is compared is the real thing: Ray's own OptunaSearch and ASHAScheduler, Optuna's own pruners,
and this package's own study and rungs. Only the training is a lookup. `line_up` names the searches
of each comparison and builds them from their seeds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, SuccessiveHalvingPruner
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.schedulers.trial_scheduler import TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tune_mnist.benchmarks.settings import LineUp
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.space import SearchSpace
from tune_mnist.tuning.asha import Rungs
from tune_mnist.tuning.settings import SearchOptions, SearchSettings
from tune_mnist.tuning.study import Study

METRIC = "val_accuracy"
OURS = "ours"

Weights = Literal["raw", "averaged"]


class Search(Protocol):
    """A search from the outside."""

    def propose(self, number: int) -> TrainConfig:
        """Return the configuration of trial `number`."""

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record an epoch's value and return True if the trial is to stop there."""

    def end(self, number: int, value: float, *, complete: bool) -> None:
        """Record that a trial has ended: at its budget, or else where `report` stopped it."""


@dataclass
class Random:
    """Random configurations, each trained to its end or to a given epoch."""

    space: SearchSpace
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        self._study = optuna.create_study(sampler=RandomSampler(seed=self.seed))

    def propose(self, number: int) -> TrainConfig:
        return self.space.config(self.space.sample(self._study.ask()))

    def report(self, number: int, epoch: int, value: float) -> bool:
        return epoch >= self.epochs

    def end(self, number: int, value: float, *, complete: bool) -> None:
        pass  # it learns nothing


class RayAsha(Random):
    """Random configurations under Ray's ASHAScheduler with its defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # It draws a trial's bracket from NumPy's global numbers; there is one bracket.
        self._asha = ASHAScheduler("training_iteration", METRIC, "max", max_t=self.epochs)

    def report(self, number: int, epoch: int, value: float) -> bool:
        trial: Any = SimpleNamespace(trial_id=str(number))  # all that the scheduler looks at
        controller: Any = None
        if epoch == 1:
            self._asha.on_trial_add(controller, trial)
        action = self._asha.on_trial_result(controller, trial, _result(epoch, value))
        return bool(action == TrialScheduler.STOP)


def _result(epoch: int, value: float) -> dict[str, Any]:
    """Return what Tune would hand on of an epoch."""
    return {"training_iteration": epoch, METRIC: value}


class Ray(RayAsha):
    """Ray's documented recipe: OptunaSearch and ASHAScheduler, both with their defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()

        def define(trial: optuna.Trial) -> dict[str, Any]:
            self.space.sample(trial)  # Ray records what is drawn; constants are returned
            return dict(self.space.constants)

        self._searcher = OptunaSearch(define, metric=METRIC, mode="max", seed=self.seed)

    def propose(self, number: int) -> TrainConfig:
        return self.space.config(self._searcher.suggest(str(number)) or {})

    def report(self, number: int, epoch: int, value: float) -> bool:
        stop = super().report(number, epoch, value)
        if not stop:  # in Tune, too, the searcher is told of all but the last report
            self._searcher.on_trial_result(str(number), _result(epoch, value))
        return stop

    def end(self, number: int, value: float, *, complete: bool) -> None:
        # A stopped trial counts as a complete one: OptunaSearch knows no pruned ones.
        self._searcher.on_trial_complete(str(number), {METRIC: value})


@dataclass
class Optuna:
    """Optuna alone: its TPE and one of its pruners, made for the epochs of a trial."""

    space: SearchSpace
    epochs: int
    seed: int
    pruner: Callable[[int], BasePruner]

    def __post_init__(self) -> None:
        self._study = optuna.create_study(
            study_name=str(self.seed),  # Hyperband draws a trial's bracket from it
            direction="maximize",
            sampler=TPESampler(seed=self.seed),
            pruner=self.pruner(self.epochs),
        )
        self._trials: dict[int, optuna.Trial] = {}

    def propose(self, number: int) -> TrainConfig:
        self._trials[number] = trial = self._study.ask()
        return self.space.config(self.space.sample(trial))

    def report(self, number: int, epoch: int, value: float) -> bool:
        if math.isnan(value):
            return True
        self._trials[number].report(value, epoch)
        return self._trials[number].should_prune()

    def end(self, number: int, value: float, *, complete: bool) -> None:
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        self._study.tell(self._trials[number], value if complete else None, state)


@dataclass
class Ours:
    """This package's study and rungs. Without start points the baseline is first, in no rung."""

    space: SearchSpace
    epochs: int
    seed: int
    grace_epochs: int
    reduction_factor: float
    startup_trials: int
    baseline: bool = True

    def __post_init__(self) -> None:
        options = SearchOptions(seed=self.seed, startup_trials=self.startup_trials)
        self._study = Study(options, None)
        self._rungs = Rungs(self.grace_epochs, self.reduction_factor, self.epochs)
        self._reported: set[int] = set()

    def propose(self, number: int) -> TrainConfig:
        if number or not self.baseline:
            return self.space.config(self._study.ask(number, self.space.sample, {}, {}))
        config = self.space.baseline()
        params, distributions = self.space.frozen_params(config) or ({}, {})
        trial = create_trial(state=TrialState.RUNNING, params=params, distributions=distributions)
        trial.number = 0
        self._study.add(trial)
        return config

    def report(self, number: int, epoch: int, value: float) -> bool:
        if math.isnan(value):
            return True
        self._reported.add(number)
        self._study.report(number, epoch, value)
        if self.baseline and number == 0:
            return False
        return self._rungs.should_stop(number, epoch, value)

    def end(self, number: int, value: float, *, complete: bool) -> None:
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        self._study.tell(number, state if number in self._reported else TrialState.FAIL, {})


Build = Callable[[SearchSpace, int, int], Search]  # space, epochs of a trial, seed


@dataclass(frozen=True)
class Entry:
    """One search of a line-up."""

    build: Build
    weights: Weights = "averaged"  # that it judges by and hands over


def line_up(name: LineUp) -> Mapping[str, Entry]:
    """Return the searches of a comparison by name; our defaults are in each, as `ours`."""
    ours = _ours()
    match name:
        case "systems":
            halving = partial(Optuna, pruner=lambda epochs: SuccessiveHalvingPruner())
            hyperband = partial(Optuna, pruner=lambda epochs: HyperbandPruner(max_resource=epochs))
            others = {
                "random": Entry(Random),
                "random, one epoch each": Entry(lambda space, _, seed: Random(space, 1, seed)),
                "random + Ray's ASHA": Entry(RayAsha),
                "Ray's OptunaSearch + ASHA": Entry(Ray),
                "Optuna TPE + SuccessiveHalving": Entry(halving),
                "Optuna TPE + Hyperband": Entry(hyperband),
                "ours, raw weights": replace(ours, weights="raw"),
                "ours, no baseline": _ours(baseline=False),
            }
        case "stopping":
            others = {
                f"grace {grace}, factor {factor}": _ours(
                    grace_epochs=grace, reduction_factor=factor
                )
                for grace in (1, 2, 3, 5)
                for factor in (2, 3, 4)
            }
        case "sampling":
            counts = (5, 10, 20, 1000)
            others = {f"{count} random first": _ours(startup_trials=count) for count in counts}
    return {OURS: ours} | others


def _ours(**changed: Any) -> Entry:
    defaults = SearchSettings()
    names = ("grace_epochs", "reduction_factor", "startup_trials")
    return Entry(partial(Ours, **{name: getattr(defaults, name) for name in names} | changed))
