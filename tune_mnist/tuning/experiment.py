"""One search's course: which trial comes next, whether it goes on, what is written down.

Ray-free: Tune's searcher, scheduler and callback are thin adapters around this one object, and
the benchmarks replay whole searches on it. Every step is on disk before its outcome is acted on:
the trial before it starts, the checkpoint before its epoch's row, the row before the next epoch.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState, create_trial

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.metrics import EpochMetrics, Metric
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.history import Assignment, EpochRow, History, Origin, State, TrialRecord
from tune_mnist.runs.ranking import BestSoFar
from tune_mnist.runs.space import SearchSpace
from tune_mnist.tuning.asha import Rungs
from tune_mnist.tuning.study import Study

OPTUNA_STATES: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class FixedTrial:
    """A trial that is settled before the first one starts."""

    config: TrainConfig
    seed: int
    origin: Origin


@dataclass(frozen=True)
class Rules:
    """What a search goes by."""

    space: SearchSpace
    metric: Metric
    trials: int  # how many trials to start in all
    epochs: int  # the budget of a trial
    time_budget: float  # seconds over all sessions; infinite for none
    grace_epochs: int
    reduction_factor: float
    startup_trials: int
    seed: int
    listed: Sequence[FixedTrial] = ()  # all the trials; without it, the space's and the sampler's


class Experiment:
    """The course of one search."""

    def __init__(
        self,
        rules: Rules,
        history: History,
        study: Study,
        checkpoints: Checkpoints,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules, self.history = rules, history
        self._study, self._checkpoints = study, checkpoints
        self._clock, self._began = clock, clock() - history.elapsed
        self._rungs = Rungs(rules.grace_epochs, rules.reduction_factor, rules.epochs)
        self._waiting: deque[TrialRecord] = deque()
        self._best = BestSoFar(rules.metric)
        self.broken: Exception | None = None  # what keeps the search from going on
        self._take_up_history()

    @property
    def elapsed(self) -> float:
        """Seconds that the search has run, over all sessions."""
        return self._clock() - self._began

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is used up."""
        return self.elapsed >= self.rules.time_budget

    @property
    def has_next(self) -> bool:
        """Whether any trial is still to be started or gone on with."""
        return bool(self._waiting) or len(self.history.trials) < self.rules.trials

    @property
    def live(self) -> int:
        """How many trials are with a worker, or on their way to one."""
        return len(self.history.unfinished()) - len(self._waiting)

    def next_trial(self, ray_id: str) -> Assignment:
        """Return the next trial to run: one that was broken off, else a new one."""
        if self._waiting:
            record = self._waiting.popleft()
            self.history.rerun_trial(record.number, self.elapsed, ray_id=ray_id, error="")
            return self.assignment(record.number)
        number = len(self.history.trials)
        trial = self._propose(number, ray_id)
        record = TrialRecord(
            number=number,
            config=trial.config,
            seed=trial.seed,
            origin=trial.origin,
            ray_id=ray_id,
        )
        self.history.start_trial(record, self.elapsed)
        return self.assignment(number)

    def assignment(self, number: int) -> Assignment:
        """Return what it takes to go on with a trial from its last saved epoch."""
        record = self.history.trials[number]
        saved = self._checkpoints.load(number, up_to=record.epochs)
        return Assignment(
            number=number,
            config=record.config,
            seed=record.seed,
            epochs=self.rules.epochs,
            metric=self.rules.metric,
            state=saved.state if saved else None,
        )

    def report(
        self, number: int, metrics: EpochMetrics, state: bytes, model: bytes | None
    ) -> bool:
        """Take in an epoch and return whether the trial is to stop there.

        The best model is written first and the row last: a kill in between leaves an epoch that
        is run again, or one whose row the checkpoint holds.

        Raises:
            OSError: it could not be written down.
        """
        record = self.history.trials[number]
        row = EpochRow(**metrics.as_dict(), trial=number, elapsed=self.elapsed)
        if row.epoch > record.epochs:
            if self._best.take(record, row) and model is not None:
                self._checkpoints.save_best(model)
            self._checkpoints.save(number, row, state)
            self.history.add_epoch(row)
            if not row.diverged:
                self._study.report(number, row.epoch, row.accuracy(self.rules.metric))
        return self._should_stop(record, record.rows[row.epoch - 1])

    def finish(self, number: int) -> None:
        """Give a trial that was told to stop its final state."""
        record = self.history.trials[number]
        state, reason = outcome(record, self.rules.epochs)
        self._end(record, state, reason)

    def fail(self, number: int, error: str) -> None:
        """Give up a trial."""
        self._end(self.history.trials[number], "failed", error)

    def retry(self, number: int, error: str) -> None:
        """Note that a trial's worker failed; it is the next to be handed out."""
        record = self.history.trials[number]
        self.history.rerun_trial(number, self.elapsed, ray_id=record.ray_id, error=error)
        self._waiting.appendleft(record)

    def close(self, why: str) -> str | None:
        """End the session; returns why study.db could not be brought up to date, or None."""
        try:
            self.history.close_session(why, self.elapsed)
        finally:
            study_failure = self._study.close()
        return study_failure

    def _end(self, record: TrialRecord, state: State, reason: str) -> None:
        self.history.end_trial(record.number, self.elapsed, state, reason)
        optuna_state = OPTUNA_STATES[state]
        if state == "diverged" and not record.finite_rows:
            optuna_state = TrialState.FAIL
        attributes = {"state": state, "reason": reason, "ray_trial_id": record.ray_id}
        self._study.tell(record.number, optuna_state, attributes)
        self._checkpoints.remove(record.number)

    def _should_stop(self, record: TrialRecord, row: EpochRow) -> bool:
        if row.diverged or row.epoch >= self.rules.epochs:
            return True
        accuracy = row.accuracy(self.rules.metric)
        stop = self._rungs.should_stop(record.number, row.epoch, accuracy)
        # The baseline is the yardstick at every epoch, so it always runs to its end.
        return stop and record.origin != "baseline"

    def _propose(self, number: int, ray_id: str) -> FixedTrial:
        """Choose trial `number`'s configuration and start it in the study."""
        space, seed = self.rules.space, _trial_seed(self.rules.seed, number)
        if self.rules.listed or number == 0:
            listed = self.rules.listed or [FixedTrial(space.baseline(), seed, "baseline")]
            settled = listed[number]
            template = _template(number, space, settled.config, {"ray_trial_id": ray_id})
            self._study.add(template)
            return settled
        fixed = space.start[number - 1] if number <= len(space.start) else {}
        sampled = self._study.ask(number, space.sample, fixed, {"ray_trial_id": ray_id})
        return FixedTrial(TrainConfig.from_mapping(sampled), seed, "start" if fixed else "sampled")

    def _take_up_history(self) -> None:
        """Rebuild study, rungs and best from the record, and queue what was broken off."""
        for record in self.history.unfinished():
            saved = self._checkpoints.load(record.number, up_to=record.epochs + 1)
            if saved and saved.row.epoch == record.epochs + 1:
                self.history.add_epoch(saved.row)  # the kill came between checkpoint and row
        stops: dict[int, bool] = {}
        for record, row in self.history.rows:
            stops[record.number] = self._should_stop(record, row)
            self._best.take(record, row)
        for record in self.history.trials.values():
            self._study.add(_known(record, self.rules))
            if record.state == "running":
                if stops.get(record.number, False):
                    self.finish(record.number)
                else:
                    self._waiting.append(record)
        self._checkpoints.remove_others({record.number for record in self._waiting})


def outcome(record: TrialRecord, budget: int) -> tuple[State, str]:
    """Say what became of a trial that was told to stop, and why."""
    last = record.rows[-1]
    if last.diverged:
        return "diverged", (
            f"the loss was not finite at step {last.diverged_step} of epoch {last.epoch}"
        )
    if record.epochs >= budget:
        return "complete", ""
    return "stopped", f"among the poorer ones at epoch {last.epoch}"


def _known(record: TrialRecord, rules: Rules) -> FrozenTrial:
    """Build Optuna's view of a recorded trial."""
    attributes = {"ray_trial_id": record.ray_id}
    if record.state != "running":
        attributes |= {"state": record.state, "reason": record.reason}
    trial = _template(record.number, rules.space, record.config, attributes)
    trial.intermediate_values = {
        row.epoch: row.accuracy(rules.metric) for row in record.finite_rows
    }
    trial.state = OPTUNA_STATES[record.state]
    if record.state == "diverged" and not record.finite_rows:
        trial.state = TrialState.FAIL
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        trial.value = trial.intermediate_values[max(trial.intermediate_values)]
    trial.datetime_start = datetime.fromtimestamp(record.started_at)
    if record.state != "running":
        trial.datetime_complete = datetime.fromtimestamp(record.ended_at)
    return trial


def _template(
    number: int, space: SearchSpace, config: TrainConfig, attributes: Mapping[str, Any]
) -> FrozenTrial:
    """Build a running trial; one that the space cannot express has no parameters in Optuna."""
    params, distributions = space.frozen_params(config) or ({}, {})
    trial = create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions=distributions,
        user_attrs=dict(attributes),
    )
    trial.number = number
    return trial


def _trial_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1)[0])
