"""The Optuna study: in memory for the sampler, copied to `study.db` as it changes.

The sampler reads the study in memory, so no reader of the file, no lock and no slow disk delays
a trial. The file is what optuna-dashboard opens. The search never reads it: a resume rebuilds the
study from the run's history and brings the file in line, or replaces it where it is damaged.
"""

import bisect
import contextlib
import heapq
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from tune_mnist.tuning.settings import SearchOptions
from tune_mnist.tuning.study_file import STUDY_NAME, StudyFile

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Study:
    """The study of one search."""

    def __init__(self, options: SearchOptions, file: StudyFile | None) -> None:
        self._options, self._file = options, file
        self._storage = _Storage()
        self._study = optuna.create_study(
            storage=self._storage, study_name=STUDY_NAME, direction="maximize"
        )
        self._study.set_metric_names([options.metric])
        self._study_id = self._storage.get_study_id_from_name(STUDY_NAME)

    def ask(
        self,
        number: int,
        sample: Callable[[optuna.Trial], dict[str, Any]],
        fixed: Mapping[str, Any],
        attributes: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Start trial `number` and return its sampled parameters; `fixed` ones are taken as is."""
        self._study.sampler = self._sampler(number)
        if fixed:
            self._study.enqueue_trial(dict(fixed))
        with self._storage.serving_sampler():
            trial = self._study.ask()
            if trial.number != number:
                raise RuntimeError(f"Optuna numbered trial {number} as {trial.number}")
            sampled = sample(trial)
        self._set_attributes(number, attributes)
        self._copy(number)
        return sampled

    def add(self, trial: FrozenTrial) -> None:
        """Add a trial that Optuna did not propose here, finished or running."""
        if trial.number != self._storage.trials:
            raise RuntimeError(f"Optuna numbers trial {trial.number} as {self._storage.trials}")
        self._study.add_trial(trial)
        self._copy(trial.number)

    def report(self, number: int, epoch: int, value: float) -> None:
        self._storage.set_trial_intermediate_value(self._id(number), epoch, value)
        self._copy(number)

    def tell(self, number: int, state: TrialState, attributes: Mapping[str, Any]) -> None:
        """Set a trial's final state; a pruned or complete trial has the value it reported last."""
        self._set_attributes(number, attributes)
        reports = self._trial(number).intermediate_values
        value = reports[max(reports)] if state == TrialState.COMPLETE else None
        self._study.tell(number, values=value, state=state)
        self._copy(number)

    def trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def close(self) -> str | None:
        """Bring the file up to date, or return why that failed.

        Trials that a resume will continue are WAITING in it.
        """
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._storage.set_trial_state_values(self._id(trial.number), TrialState.WAITING)
            self._copy(trial.number)
        return self._file.close() if self._file else None

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return the sampler for one trial; its random numbers depend on the trial alone.

        So a resumed search proposes what the uninterrupted one would have.
        """
        return optuna.samplers.TPESampler(
            n_startup_trials=self._options.startup_trials,
            multivariate=True,
            group=True,  # conditional spaces: trials that share their active parameters
            constant_liar=True,  # keeps parallel trials apart
            seed=int(np.random.SeedSequence([self._options.seed, number]).generate_state(1)[0]),
        )

    def _set_attributes(self, number: int, attributes: Mapping[str, Any]) -> None:
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), key, value)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _trial(self, number: int) -> FrozenTrial:
        """Return a trial as it is now; the storage replaces the object at every change."""
        return self._storage.get_trial(self._id(number))

    def _copy(self, number: int) -> None:
        if self._file:
            self._file.put(self._trial(number))


class _Storage(InMemoryStorage):
    """A storage that keeps no attributes of the sampler's and limits what the sampler reads.

    TPE stores, for its peers in other processes, what it drew for a running trial, also for
    parameters that are inactive in it, and models those values with the rest. There are no peers
    here, and a study rebuilt from the run's history would lack them and propose otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trials = 0  # in all
        self._for_sampler = False
        self._model_trials = ModelTrials()

    @contextlib.contextmanager
    def serving_sampler(self) -> Iterator[None]:
        """For a while, return only the trials that the sampler models."""
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
        if not self._for_sampler:
            trials: list[FrozenTrial] = super().get_all_trials(study_id, deepcopy, states)
            return trials
        modelled = [
            self.get_trial(self.get_trial_id_from_study_id_trial_number(study_id, number))
            for number in self._model_trials.numbers
        ]
        return [trial for trial in modelled if states is None or trial.state in states]

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id: int = super().create_new_trial(study_id, template_trial)
        self.trials += 1
        self._model_trials.update(self.get_trial(trial_id))
        return trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        is_set: bool = super().set_trial_state_values(trial_id, state, values)
        self._model_trials.update(self.get_trial(trial_id))
        return is_set

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if not key.startswith("tpe:"):
            super().set_trial_system_attr(trial_id, key, value)


MODELLED = 250  # finished trials at most; from this many on TPE counts 25 of them as good
MODELLED_BEST = 50  # of these the best; the others are the latest

_Rank = tuple[int, int, float]


class ModelTrials:
    """Which trials the sampler models: the unfinished, the best and the latest.

    TPE models where the best 25 trials lie and how the others spread. Its work grows with their
    number, to 60 ms a proposal for 2,000, so in a long search it reads only a part of them. The
    choice is updated as trials begin and end: choosing among all would slow down in the same way.
    """

    def __init__(self) -> None:
        self._unfinished: set[int] = set()
        self._latest: list[tuple[int, _Rank]] = []  # finished, by number
        self._best: list[tuple[_Rank, int]] = []  # of the earlier ones: a heap, poorest first

    def update(self, trial: FrozenTrial) -> None:
        """Record that a trial has begun or ended."""
        if not trial.state.is_finished():
            self._unfinished.add(trial.number)
            return
        self._unfinished.discard(trial.number)
        bisect.insort(self._latest, (trial.number, _rank(trial)))
        if len(self._latest) > MODELLED - MODELLED_BEST:
            number, rank = self._latest.pop(0)
            heapq.heappush(self._best, (rank, -number))  # of equals the earlier one stays
            if len(self._best) > MODELLED_BEST:
                heapq.heappop(self._best)

    @property
    def numbers(self) -> list[int]:
        """The numbers of the trials, ascending."""
        best = (-negative for _, negative in self._best)
        latest = (number for number, _ in self._latest)
        return sorted([*self._unfinished, *best, *latest])


def _rank(trial: FrozenTrial) -> _Rank:
    """Rank a finished trial as TPE does: pruned ones by how far they came."""
    match trial.state:
        case TrialState.COMPLETE if trial.value is not None:
            return 2, 0, trial.value
        case TrialState.PRUNED if trial.intermediate_values:
            step, value = max(trial.intermediate_values.items())
            return 1, step, value
        case _:
            return 0, 0, 0.0
