from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from support.drivers import Searches, history_of
from support.recorded import RecordedSearch
from support.scripted import Script

from tune_mnist.errors import ConfigError
from tune_mnist.runs.history import TrialRecord
from tune_mnist.tuning.trackers import MlflowRuns, check_mlflow, mlflow_trackers

pytest_plugins = ["support.ray_fixtures"]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of MLflow's own; making one takes it seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    check_mlflow(uri)
    return uri


def _runs(uri: str, experiment: str) -> dict[str, Any]:
    """Return an experiment's runs by name, each of which is there once."""
    client = MlflowClient(uri)
    known = {each.name: each.experiment_id for each in client.search_experiments()}
    runs = client.search_runs([known[experiment]])
    found = {run.info.run_name: run for run in runs}
    assert len(found) == len(runs)
    return found


def _log(tracker: MlflowRuns, *records: TrialRecord) -> None:
    for record in records:
        for row in record.rows[tracker.begin(record) :]:
            tracker.add_epoch(record, row)
        if record.state != "running":
            tracker.end(record)


def _logged(uri: str, run: Any, metric: str = "val_accuracy") -> dict[int, float]:
    points = MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    assert len({each.step for each in points}) == len(points)
    return {each.step: each.value for each in points}


def test_a_trial_is_a_run_with_parameters_metrics_by_epoch_and_its_state(
    uri: str, tmp_path: Path
) -> None:
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95], state="stopped", reason="among the poorer ones at epoch 2", lr=0.02)
    diverging = search.start()
    search.epoch(diverging, 0.9)
    search.diverged_epoch(diverging)
    search.end(diverging, "diverged")
    search.trial([], state="failed", reason="the worker died")
    records = search.history.trials
    tracker = MlflowRuns(uri, "states")
    _log(tracker, *records.values())
    tracker.close()
    stopped, diverged, failed = (_runs(uri, "states")[f"trial {n}"] for n in records)
    asked = {**records[0].config.as_dict(), "seed": records[0].seed}
    assert stopped.data.params == {name: str(value) for name, value in asked.items()}
    assert _logged(uri, stopped) == {1: 0.9, 2: 0.95}
    assert _logged(uri, diverged) == {1: 0.9}
    assert _logged(uri, diverged, "diverged_step") == {2: 33}
    states = [(each.info.status, each.data.tags["state"]) for each in (stopped, diverged, failed)]
    assert states == [("FINISHED", "stopped"), ("FINISHED", "diverged"), ("FAILED", "failed")]
    assert failed.data.tags["reason"] == "the worker died"


def test_a_resumed_search_goes_on_in_the_same_runs(uri: str, tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95])
    search.epoch(search.start(), 0.8)
    records = search.history.trials
    first = MlflowRuns(uri, "resumed")
    _log(first, *records.values())
    first.close()
    assert _runs(uri, "resumed")["trial 1"].info.status == "KILLED"
    for accuracy in (0.85, 0.88):
        search.epoch(1, accuracy)
    second = MlflowRuns(uri, "resumed")
    _log(second, *records.values())
    assert _runs(uri, "resumed")["trial 1"].info.status == "RUNNING"
    search.end(1, "complete")
    second.end(records[1])
    runs = _runs(uri, "resumed")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert _logged(uri, runs["trial 0"]) == {1: 0.9, 2: 0.95}
    assert _logged(uri, runs["trial 1"]) == {1: 0.8, 2: 0.85, 3: 0.88}


def test_a_search_logs_to_the_experiment_of_its_name(uri: str, searches: Searches) -> None:
    script = Script(seconds=0.02)
    driver = searches.start("run", "--trials", 2, "--epochs", 3, "--mlflow", uri, script=script)
    assert driver.wait() == 0, driver.output
    assert "warning" not in driver.output
    records = history_of(searches.folder("run")).trials
    runs = _runs(uri, "run")
    for number, record in records.items():
        values = {row.epoch: row.val_accuracy for row in record.rows}
        assert _logged(uri, runs[f"trial {number}"]) == pytest.approx(values)


def test_a_store_that_does_not_answer_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tracking server or store that answers"):
        check_mlflow("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="no tracking server or store that answers"):
        check_mlflow("nonsense://here")


def test_without_mlflow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_mnist.tuning.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        check_mlflow("sqlite:///mlflow.db")


def test_nobody_logs_to_mlflow_unasked() -> None:
    assert mlflow_trackers(None, "run") == {}
