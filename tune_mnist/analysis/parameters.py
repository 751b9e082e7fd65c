"""What a search varied, as its search.yaml tells it, and how much each part of it mattered."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState, create_trial

from tune_mnist.analysis.history import Metric
from tune_mnist.analysis.ranking import Standing, number

ENOUGH_TRIALS = 10  # for a first idea of what matters


@dataclass(frozen=True)
class Searched:
    """One hyperparameter that a search varied."""

    name: str
    distribution: BaseDistribution
    when: Mapping[str, Sequence[Any]]  # parent -> the values with which this one counts

    @property
    def is_log(self) -> bool:
        """Whether equal ratios of it are equal steps."""
        return bool(getattr(self.distribution, "log", False))

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """Its values, where it has no order."""
        if isinstance(self.distribution, CategoricalDistribution):
            return tuple(self.distribution.choices)
        return None


def searched_parameters(space: Any) -> list[Searched]:
    """Return what the space of a search.yaml varies; what cannot be read there is left out."""
    parameters = space.get("parameters") if isinstance(space, Mapping) else None
    found = []
    for name, entry in parameters.items() if isinstance(parameters, Mapping) else ():
        if isinstance(entry, Mapping) and (distribution := _distribution(entry)) is not None:
            when = entry.get("when")
            conditions = {
                str(parent): values if isinstance(values, list) else [values]
                for parent, values in (when.items() if isinstance(when, Mapping) else ())
            }
            found.append(Searched(str(name), distribution, conditions))
    return found


def active_values(config: Mapping[str, Any], searched: Sequence[Searched]) -> dict[str, Any]:
    """Return the searched parameters that count in a configuration, with their values."""
    conditional = {each.name for each in searched}
    values: dict[str, Any] = {}
    for each in searched:
        counts = all(
            config.get(parent) in allowed and (parent in values or parent not in conditional)
            for parent, allowed in each.when.items()
        )
        if counts and each.name in config:
            values[each.name] = config[each.name]
    return values


def importances(
    trials: Sequence[Standing], searched: Sequence[Searched], metric: Metric
) -> dict[str, float]:
    """Return the share that each parameter has in reaching the best accuracies, most first.

    By PED-ANOVA, Optuna's own, over what each trial reached at its best. Empty where there are
    too few trials, or nothing to tell them apart.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        if trial.best is None:
            continue
        values = active_values(trial.record.config, searched)
        known = {each.name: each.distribution for each in searched if each.name in values}
        try:
            frozen = create_trial(
                state=TrialState.COMPLETE,
                params=values,
                distributions=known,
                value=number(trial.best, metric),
            )
        except ValueError:  # outside the space, as the baseline may be
            continue
        study.add_trial(frozen)
    if len(study.trials) < ENOUGH_TRIALS:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental, and of branches with few trials
        try:
            return optuna.importance.get_param_importances(study)
        except (ValueError, RuntimeError):  # such as trials that are all alike
            return {}


def _distribution(entry: Mapping[str, Any]) -> BaseDistribution | None:
    low, high, step = entry.get("low"), entry.get("high"), entry.get("step")
    log = bool(entry.get("log", False))
    try:
        if "choices" in entry:
            return CategoricalDistribution(tuple(entry["choices"]))
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log, step=int(step or 1))
        if low is None or high is None:
            return None
        return FloatDistribution(float(low), float(high), log=log, step=step)
    except (ValueError, TypeError):
        return None
