"""The trials as runs of an MLflow experiment, by Ray's own callback."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from tune_mnist.analysis.history import METRICS, Row, TrialRecord
from tune_mnist.errors import ConfigError
from tune_mnist.tuning.tracking import Tracker

_RETRIES = "2"  # of a request; MLflow's own would try for minutes, and we try again anyway
_PAGE = 1000  # runs asked for at once
_STEP = "training_iteration"  # of Ray's callback: a metric that it wants, the epoch


@dataclass(frozen=True)
class _LoggedTrial:
    """What Ray's callback is shown of a trial: no states, no bytes, nothing of ours."""

    number: int
    config: dict[str, Any] = field(compare=False)

    def __str__(self) -> str:
        return f"trial {self.number}"


class MlflowRuns:
    """Logs each trial as a run: its hyperparameters, its metrics by epoch, its final state.

    A trial that is there already, from an earlier session, goes on in the same run.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        from mlflow.tracking import MlflowClient
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        _quieten()
        self._client = MlflowClient(tracking_uri)
        callback: Any = MLflowLoggerCallback(tracking_uri, experiment_name=experiment)
        callback.setup()
        self._callback = callback
        self._trials: dict[int, _LoggedTrial] = {}
        self._there = self._runs_there()

    def begin(self, record: TrialRecord) -> int:
        """Take up a trial, in the run that it has already or in a new one."""
        trial = _LoggedTrial(record.number, {**record.config, "seed": record.seed})
        # That the number alone does not tell: another search may have had the run's name.
        tags = {"started_at": repr(record.started_at)}
        run = self._there.get((str(trial), tags["started_at"]))
        if run is not None:
            if "state" in run.data.tags:
                return record.epochs
            self._callback._trial_runs[trial] = run.info.run_id
            self._client.update_run(run.info.run_id, "RUNNING")
        self._trials[record.number] = trial
        self._callback.tags = {**tags, "origin": record.origin}
        self._callback.log_trial_start(trial)
        return int(run.data.metrics.get(_STEP, 0)) if run is not None else 0

    def add_epoch(self, record: TrialRecord, row: Row) -> None:
        """Log an epoch's finite metrics."""
        metrics = {name: row[name] for name in METRICS if name != "epoch"}
        finite = {name: v for name, v in metrics.items() if v is not None and math.isfinite(v)}
        trial = self._trials[record.number]
        # The step last: where it is, the others are.
        self._callback.log_trial_result(0, trial, {**finite, _STEP: row["epoch"]})

    def end(self, record: TrialRecord) -> None:
        """Log how a trial ended."""
        trial = self._trials.get(record.number)
        if trial is None:  # an earlier session has
            return
        run_id = self._callback._trial_runs[trial]
        self._callback.log_trial_end(trial, failed=record.state == "failed")
        if record.reason:
            self._client.set_tag(run_id, "reason", record.reason)
        self._client.set_tag(run_id, "state", record.state)
        del self._trials[record.number]

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Show the trials that have not ended as such."""
        for trial in self._trials.values():
            self._client.set_terminated(self._callback._trial_runs[trial], "KILLED")

    def _runs_there(self) -> dict[tuple[str, str], Any]:
        """Return the experiment's runs by name and by when their trials started."""
        experiment = self._callback.mlflow_util.experiment_id
        page = self._client.search_runs([experiment], max_results=_PAGE)
        found = list(page)
        while page.token:
            page = self._client.search_runs([experiment], max_results=_PAGE, page_token=page.token)
            found += page
        return {(run.info.run_name, run.data.tags.get("started_at", "")): run for run in found}


def mlflow_trackers(tracking_uri: str | None, experiment: str) -> dict[str, Callable[[], Tracker]]:
    """Return what shows a search to MLflow, by its name; nothing where nobody asked for it."""
    return (
        {} if tracking_uri is None else {"MLflow": partial(MlflowRuns, tracking_uri, experiment)}
    )


def check_mlflow(tracking_uri: str) -> None:
    """See, before anything is started, that MLflow is installed and answers.

    Raises:
        ConfigError: it is not, or does not.
    """
    if find_spec("mlflow") is None:
        raise ConfigError(
            "--mlflow needs MLflow's client, which is not installed: pip install mlflow-skinny"
        )
    from mlflow.tracking import MlflowClient

    _quieten()
    try:
        MlflowClient(tracking_uri).search_experiments(max_results=1)
    except Exception as error:  # its stores have many ways to say no
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"--mlflow: {tracking_uri} is no tracking server or store that answers ({what})"
        ) from error


def _quieten() -> None:
    """Keep MLflow, once it is imported, from writing into the live view and waiting for long."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", _RETRIES)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
