"""The Optuna study: a working copy in memory, mirrored to `study.db` as it changes.

The sampler reads the copy in memory, so no reader of the file, no lock and no slow disk ever holds
up a trial. The file is what optuna-dashboard opens. It is never the search's own source: it is
brought in line with the run's history when a search resumes, and made anew where it is damaged.
"""

import bisect
import contextlib
import heapq
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from tune_mnist.tuning.study_file import STUDY_NAME, StudyFile

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
    """A storage that takes no notes from the sampler, and shows it not more than it needs.

    TPE notes for its peers in other processes what it drew for a running trial, also for
    parameters that are inactive in it, and models them with the rest. There are no peers here,
    and a study built again from the run's history would lack the notes and propose otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self._for_sampler = False
        self._model_trials = ModelTrials()

    @contextlib.contextmanager
    def serving_sampler(self) -> Iterator[None]:
        """Show, for a while, only the trials that a model is made of."""
        self._for_sampler = True
        try:
            yield
        finally:
            self._for_sampler = False

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials, or those of them that are for the sampler."""
        if not self._for_sampler:
            trials: list[FrozenTrial] = super().get_all_trials(study_id, deepcopy, states)
            return trials
        shown = [
            self.get_trial(self.get_trial_id_from_study_id_trial_number(study_id, number))
            for number in self._model_trials.numbers
        ]
        return [trial for trial in shown if states is None or trial.state in states]

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial, and keep up what the sampler is shown."""
        trial_id: int = super().create_new_trial(study_id, template_trial)
        self._take_state(trial_id)
        return trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Set a trial's state, and keep up what the sampler is shown."""
        is_set: bool = super().set_trial_state_values(trial_id, state, values)
        self._take_state(trial_id)
        return is_set

    def _take_state(self, trial_id: int) -> None:
        trial = self.get_trial(trial_id)
        if trial.state.is_finished():
            self._model_trials.end(trial)
        else:
            self._model_trials.begin(trial.number)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Keep an attribute, unless it is the sampler's."""
        if not key.startswith("tpe:"):
            super().set_trial_system_attr(trial_id, key, value)


class Study:
    """The study of one search."""

    def __init__(self, sampler: SamplerSettings, metric: str, mirror: StudyFile | None) -> None:
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
        with self._storage.serving_sampler():
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


# MERGED-DOC tuning.model_trials: Which trials the sampler's model is made of. TPE asks which
# region the best 25 trials come from and how the others spread; its work grows with their number,
# to 60 ms a proposal for 2,000. So in a long search it is shown a part of them.

MODELLED = 250  # finished trials at most; from so many on TPE takes those 25
MODELLED_BEST = 50  # of these the best; the others are the latest

_Standing = tuple[int, int, float]


class ModelTrials:
    """The unfinished trials, the best and the latest.

    Kept up as trials begin and end: a choice among all of them would cost more with every trial.
    """

    def __init__(self) -> None:
        self._unfinished: set[int] = set()
        self._latest: list[tuple[int, _Standing]] = []  # finished, by number
        self._best: list[tuple[_Standing, int]] = []  # of the earlier ones: a heap, poorest first

    def begin(self, number: int) -> None:
        """Take in a trial that has not finished."""
        self._unfinished.add(number)

    def end(self, trial: FrozenTrial) -> None:
        """Take in a trial that has finished."""
        self._unfinished.discard(trial.number)
        bisect.insort(self._latest, (trial.number, _standing(trial)))
        if len(self._latest) > MODELLED - MODELLED_BEST:
            number, standing = self._latest.pop(0)
            heapq.heappush(self._best, (standing, -number))  # of equals the earlier one stays
            if len(self._best) > MODELLED_BEST:
                heapq.heappop(self._best)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the trials, ascending."""
        best = (-negative for _, negative in self._best)
        return sorted([*self._unfinished, *best, *(number for number, _ in self._latest)])


def _standing(trial: FrozenTrial) -> _Standing:
    """Rank a finished trial as TPE does: those told to stop by how far they came."""
    match trial.state:
        case TrialState.COMPLETE if trial.value is not None:
            return 2, 0, trial.value
        case TrialState.PRUNED if trial.intermediate_values:
            step, value = max(trial.intermediate_values.items())
            return 1, step, value
        case _:
            return 0, 0, 0.0
