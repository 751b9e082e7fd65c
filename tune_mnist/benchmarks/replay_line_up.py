"""Who is compared in a replay: by name, how each search is built from its seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from optuna.pruners import HyperbandPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler

from tune_mnist.benchmarks.recorded_curves import Weights
from tune_mnist.benchmarks.replay_systems import Optuna, Ours, Random, Ray, RayAsha, Search
from tune_mnist.runs.space import SearchSpace
from tune_mnist.tuning.settings import SearchSettings

LineUp = Literal["systems", "stopping", "sampling"]
Build = Callable[[SearchSpace, int, int], Search]  # space, epochs of a trial, seed
OURS = "ours"


@dataclass(frozen=True)
class Entry:
    """One search of a line-up."""

    build: Build
    weights: Weights = "averaged"  # that it judges by and hands over


def line_up(name: LineUp) -> Mapping[str, Entry]:
    """Return the searches that a comparison is made of; our defaults are in each, as `ours`."""
    ours = {OURS: Entry(_ours())}
    match name:
        case "systems":
            return ours | SYSTEMS
        case "stopping":
            return ours | _stopping()
        case "sampling":
            return ours | _sampling()


def _ours(**changed: float) -> Build:
    return partial(_build_ours, changed)


def _build_ours(changed: Mapping[str, float], space: SearchSpace, epochs: int, seed: int) -> Ours:
    defaults = SearchSettings()
    settings = {
        "grace_epochs": defaults.grace_epochs,
        "reduction_factor": defaults.reduction_factor,
        "startup_trials": defaults.startup_trials,
        **changed,
    }
    return Ours(space, epochs, seed, **settings)  # type: ignore[arg-type]


def _one_epoch(space: SearchSpace, epochs: int, seed: int) -> Search:
    return Random(space, 1, seed)


def _optuna_halving(space: SearchSpace, epochs: int, seed: int) -> Search:
    return Optuna(space, epochs, TPESampler(seed=seed), SuccessiveHalvingPruner(), seed)


def _optuna_hyperband(space: SearchSpace, epochs: int, seed: int) -> Search:
    pruner = HyperbandPruner(max_resource=epochs)
    return Optuna(space, epochs, TPESampler(seed=seed), pruner, seed)


SYSTEMS: dict[str, Entry] = {
    "random": Entry(Random),
    "random, one epoch each": Entry(_one_epoch),
    "random + Ray's ASHA": Entry(RayAsha),
    "Ray's OptunaSearch + ASHA": Entry(Ray),
    "Optuna TPE + SuccessiveHalving": Entry(_optuna_halving),
    "Optuna TPE + Hyperband": Entry(_optuna_hyperband),
    "ours, raw weights": Entry(_ours(), weights="raw"),
    "ours, no baseline": Entry(_ours(baseline=False)),
}


def _stopping() -> dict[str, Entry]:
    return {
        f"grace {grace}, factor {factor}": Entry(
            _ours(grace_epochs=grace, reduction_factor=factor)
        )
        for grace in (1, 2, 3, 5)
        for factor in (2, 3, 4)
    }


def _sampling() -> dict[str, Entry]:
    return {
        f"{count} random first": Entry(_ours(startup_trials=count)) for count in (5, 10, 20, 1000)
    }
