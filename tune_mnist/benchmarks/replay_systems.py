"""The searches that `bench replay` compares: who proposes, who stops, each from its own library.

What is compared is the real thing: Ray's own OptunaSearch and ASHAScheduler, Optuna's own pruners,
and this package's own study and rungs. Only the training is a lookup.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import TrialState, create_trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.schedulers.trial_scheduler import TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.space import SearchSpace
from tune_mnist.tuning.asha import Rungs
from tune_mnist.tuning.study import SamplerSettings, Study

METRIC = "val_accuracy"


class Search(Protocol):
    """A search from the outside."""

    def propose(self, number: int) -> TrainConfig:
        """Return the configuration of trial `number`."""

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Take in an epoch's value and return whether the trial is to stop there."""

    def end(self, number: int, value: float, *, complete: bool) -> None:
        """Learn that a trial has ended: at its budget, or else where `report` stopped it."""


@dataclass
class Random:
    """Random configurations, each trained to its end or to a given epoch."""

    space: SearchSpace
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        self._study = optuna.create_study(sampler=RandomSampler(seed=self.seed))

    def propose(self, number: int) -> TrainConfig:
        """Draw one."""
        return self.space.config(self.space.sample(self._study.ask()))

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Stop at the given epoch."""
        return epoch >= self.epochs

    def end(self, number: int, value: float, *, complete: bool) -> None:
        """Learn nothing."""


class RayAsha(Random):
    """Random configurations under Ray's ASHAScheduler with its defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # It draws a trial's bracket from NumPy's global numbers; there is one bracket.
        self._asha = ASHAScheduler("training_iteration", METRIC, "max", max_t=self.epochs)
        self._trials: dict[int, Any] = {}
        self._controller: Any = None  # which the scheduler is handed and never looks at

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Ask Ray."""
        if number not in self._trials:
            self._trials[number] = SimpleNamespace(trial_id=str(number))
            self._asha.on_trial_add(self._controller, self._trials[number])
        result = {"training_iteration": epoch, METRIC: value}
        trial = self._trials[number]
        action = self._asha.on_trial_result(self._controller, trial, result)
        return bool(action == TrialScheduler.STOP)


class Ray(RayAsha):
    """Ray's documented recipe: OptunaSearch and ASHAScheduler, both with their defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()

        def define(trial: optuna.Trial) -> dict[str, Any]:
            self.space.sample(trial)  # Ray notes what is drawn; constants are returned
            return dict(self.space.constants)

        self._searcher = OptunaSearch(define, metric=METRIC, mode="max", seed=self.seed)

    def propose(self, number: int) -> TrainConfig:
        """Ask Ray's searcher."""
        return self.space.config(self._searcher.suggest(str(number)) or {})

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Ask Ray's scheduler; its searcher hears, as in Tune, of all but the last report."""
        stop = super().report(number, epoch, value)
        if not stop:
            result = {"training_iteration": epoch, METRIC: value}
            self._searcher.on_trial_result(str(number), result)
        return stop

    def end(self, number: int, value: float, *, complete: bool) -> None:
        """Tell Ray's searcher, which makes every trial a complete one."""
        self._searcher.on_trial_complete(str(number), {METRIC: value})


@dataclass
class Optuna:
    """Optuna alone: one of its samplers, one of its pruners."""

    space: SearchSpace
    epochs: int
    sampler: BaseSampler
    pruner: BasePruner
    seed: int

    def __post_init__(self) -> None:
        self._study = optuna.create_study(
            study_name=str(self.seed),  # Hyperband draws a trial's bracket from it
            direction="maximize",
            sampler=self.sampler,
            pruner=self.pruner,
        )
        self._trials: dict[int, optuna.Trial] = {}

    def propose(self, number: int) -> TrainConfig:
        """Ask the study."""
        self._trials[number] = trial = self._study.ask()
        return self.space.config(self.space.sample(trial))

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Ask the pruner, but of a loss that is not finite."""
        if math.isnan(value):
            return True
        self._trials[number].report(value, epoch)
        return self._trials[number].should_prune()

    def end(self, number: int, value: float, *, complete: bool) -> None:
        """Tell the study."""
        if complete:
            self._study.tell(self._trials[number], value)
        else:
            self._study.tell(self._trials[number], state=TrialState.PRUNED)


@dataclass
class Ours:
    """This package's study and rungs, with the baseline first, which is never stopped."""

    space: SearchSpace
    epochs: int
    seed: int
    grace_epochs: int
    reduction_factor: float
    startup_trials: int
    baseline: bool = True

    def __post_init__(self) -> None:
        self._study = Study(SamplerSettings(self.seed, self.startup_trials), METRIC, None)
        self._rungs = Rungs(self.grace_epochs, self.reduction_factor, self.epochs)
        self._reported: set[int] = set()

    def propose(self, number: int) -> TrainConfig:
        """Begin with the baseline, then ask the study."""
        if self.baseline and number == 0:
            config = self.space.baseline()
            params, distributions = self.space.frozen_params(config) or ({}, {})
            trial = create_trial(
                state=TrialState.RUNNING, params=params, distributions=distributions
            )
            trial.number = 0
            self._study.add(trial)
            return config
        return self.space.config(self._study.ask(number, self.space.sample, {}, {}))

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Ask the rungs, but of a loss that is not finite."""
        if math.isnan(value):
            return True
        self._reported.add(number)
        self._study.report(number, epoch, value)
        stop = self._rungs.should_stop(number, epoch, value)
        return stop and not (self.baseline and number == 0)

    def end(self, number: int, value: float, *, complete: bool) -> None:
        """Tell the study."""
        state = TrialState.COMPLETE if complete else TrialState.PRUNED
        self._study.tell(number, state if number in self._reported else TrialState.FAIL, {})
