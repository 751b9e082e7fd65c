"""The Optuna study: a working copy in memory, mirrored to `study.db` as it changes.

The sampler reads the copy in memory, so no reader of the file, no lock and no slow disk ever holds
up a trial. The file is what optuna-dashboard opens. It is never the search's own source: it is
brought in line with the run's history when a search resumes, and made anew where it is damaged.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from tune_mnist.tuning.mirror import STUDY_NAME, Mirror

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class SamplerSettings:
    """How Optuna proposes."""

    seed: int
    startup_trials: int  # random configurations before the model takes over

    def sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Build the sampler for one trial; its random numbers depend on the trial alone.

        So a search that was broken off and resumed proposes what the unbroken one would have.
        """
        return optuna.samplers.TPESampler(
            n_startup_trials=self.startup_trials,
            multivariate=True,
            group=True,  # conditional spaces: trials that share their active parameters
            constant_liar=True,  # keeps parallel trials apart
            seed=int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]),
            warn_independent_sampling=False,
        )


class Study:
    """The study of one search."""

    def __init__(self, sampler: SamplerSettings, metric: str, mirror: Mirror | None) -> None:
        self._settings = sampler
        self._mirror = mirror
        self._storage = InMemoryStorage()
        self._study = optuna.create_study(
            storage=self._storage, study_name=STUDY_NAME, direction="maximize"
        )
        self._study.set_metric_names([metric])
        self._open: dict[int, optuna.Trial] = {}

    def ask(
        self,
        number: int,
        sample: Callable[[optuna.Trial], dict[str, Any]],
        fixed: Mapping[str, Any],
        attributes: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Start trial `number` and return its sampled parameters; `fixed` ones are taken as is."""
        self._study.sampler = self._settings.sampler(number)
        if fixed:
            self._study.enqueue_trial(dict(fixed))
        trial = self._study.ask()
        sampled = sample(trial)
        self._adopt(number, trial, attributes)
        return sampled

    def add(self, template: FrozenTrial) -> None:
        """Take over a trial from an earlier session, finished or running."""
        trial_id = self._storage.create_new_trial(self._study._study_id, template)
        number = self._storage.get_trial(trial_id).number
        if number != template.number:
            raise RuntimeError(f"Optuna numbered trial {template.number} as {number}")
        if template.state == TrialState.RUNNING:
            self._open[number] = optuna.Trial(self._study, trial_id)
        self._show(number)

    def _adopt(self, number: int, trial: optuna.Trial, attributes: Mapping[str, Any]) -> None:
        if trial.number != number:
            raise RuntimeError(f"Optuna numbered trial {number} as {trial.number}")
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        self._open[number] = trial
        self._show(number)

    def report(self, number: int, epoch: int, value: float) -> None:
        """Hand Optuna one finite value."""
        self._open[number].report(value, step=epoch)
        self._show(number)

    def tell(self, number: int, state: TrialState, attributes: Mapping[str, Any]) -> None:
        """Give a trial its final state; a pruned or complete one counts with its last report."""
        trial = self._open.pop(number)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        reports = self._storage.get_trial(trial._trial_id).intermediate_values
        value = reports[max(reports)] if state == TrialState.COMPLETE else None
        self._study.tell(trial, values=value, state=state)
        self._show(number)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials as Optuna sees them."""
        return self._study.get_trials(deepcopy=False)

    def close(self) -> str | None:
        """Bring the file up to date, trials that wait to be gone on with as WAITING.

        Returns:
            Why the file could not be brought up to date, or None.
        """
        for number, trial in self._open.items():
            self._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            self._show(number)
        return self._mirror.close() if self._mirror else None

    def _show(self, number: int) -> None:
        if self._mirror:
            self._mirror.put(self._storage.get_trial(number))
