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
        )


class _Storage(InMemoryStorage):
    """A storage that takes no notes from the sampler.

    TPE notes for its peers in other processes what it drew for a running trial, also for
    parameters that are inactive in it, and models them with the rest. There are no peers here,
    and a study built again from the run's history would lack the notes and propose otherwise.
    """

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute, unless it is the sampler's."""
        if not key.startswith("tpe:"):
            super().set_trial_system_attr(trial_id, key, value)


class Study:
    """The study of one search."""

    def __init__(self, sampler: SamplerSettings, metric: str, mirror: Mirror | None) -> None:
        self._settings = sampler
        self._mirror = mirror
        self._storage = _Storage()
        self._study = optuna.create_study(
            storage=self._storage, study_name=STUDY_NAME, direction="maximize"
        )
        self._study.set_metric_names([metric])
        self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)
        self._open: set[int] = set()

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
        if trial.number != number:
            raise RuntimeError(f"Optuna numbered trial {number} as {trial.number}")
        sampled = sample(trial)
        self._note(number, attributes)
        self._open.add(number)
        self._show(number)
        return sampled

    def add(self, template: FrozenTrial) -> None:
        """Take over a trial from an earlier session, finished or running."""
        number = len(self.trials())
        if number != template.number:
            raise RuntimeError(f"Optuna numbers trial {template.number} as {number}")
        self._study.add_trial(template)
        if not template.state.is_finished():
            self._open.add(number)
        self._show(number)

    def report(self, number: int, epoch: int, value: float) -> None:
        """Hand Optuna one finite value."""
        self._storage.set_trial_intermediate_value(self._id(number), epoch, value)
        self._show(number)

    def tell(self, number: int, state: TrialState, attributes: Mapping[str, Any]) -> None:
        """Give a trial its final state; a pruned or complete one counts with its last report."""
        self._open.remove(number)
        self._note(number, attributes)
        reports = self._trial(number).intermediate_values
        value = reports[max(reports)] if state == TrialState.COMPLETE else None
        self._study.tell(number, values=value, state=state)
        self._show(number)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials as Optuna sees them."""
        return self._study.get_trials(deepcopy=False)

    def close(self) -> str | None:
        """Bring the file up to date, trials that wait to be gone on with as WAITING.

        Returns:
            Why the file could not be brought up to date, or None.
        """
        for number in self._open:
            self._storage.set_trial_state_values(self._id(number), TrialState.WAITING)
            self._show(number)
        return self._mirror.close() if self._mirror else None

    def _note(self, number: int, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), key, value)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _trial(self, number: int) -> FrozenTrial:
        """Return a trial as it is now; what comes later makes another object of it."""
        return self._storage.get_trial(self._id(number))

    def _show(self, number: int) -> None:
        if self._mirror:
            self._mirror.put(self._trial(number))
