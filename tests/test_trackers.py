"""Trackers are told what the history says: by the thread, in TensorBoard's files, in MLflow."""

import math
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from support.drivers import Searches, epochs_in, history_of
from support.recorded import RecordedSearch
from support.scripted import Script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tune_mnist.errors import ConfigError
from tune_mnist.runs.history import EpochRow, History, TrialRecord
from tune_mnist.tuning import trackers
from tune_mnist.tuning.trackers import (
    EventFiles,
    MlflowRuns,
    Tracker,
    Tracking,
    mlflow_tracker,
)

pytest_plugins = ["support.ray_fixtures"]

PATIENCE = 60.0  # seconds that anything may take
SO_FAR = ["begin 0", "epoch 0.1", "epoch 0.2", "end 0 stopped", "begin 1", "epoch 1.1"]


class Notebook:
    """A tracker that notes what it is told, and fails when it is told to."""

    def __init__(self, there: int = 0, fails_at: str = "") -> None:
        self._there, self._fails_at = there, fails_at
        self.notes: list[str] = []
        self.is_up_to_date = threading.Event()

    def begin(self, record: TrialRecord) -> int:
        self._note(f"begin {record.number}")
        return self._there

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        self._note(f"epoch {record.number}.{row.epoch}")
        if self.notes == SO_FAR:
            self.is_up_to_date.set()

    def end(self, record: TrialRecord) -> None:
        self._note(f"end {record.number} {record.state}")

    def close(self) -> None:
        self._note("close")

    def _note(self, what: str) -> None:
        if what == self._fails_at:
            raise OSError(28, "No space left on device")
        self.notes.append(what)


@pytest.fixture
def search(tmp_path: Path) -> RecordedSearch:
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95], state="stopped")
    search.epoch(search.start(lr=0.02), 0.8)
    return search


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("FOLLOW_EVERY", "RETRY_AFTER", "PAUSE_AT_MOST"):
        monkeypatch.setattr(trackers, name, 0.01)
    monkeypatch.setattr(trackers, "CLOSING_PATIENCE", PATIENCE)


def show(history: History, start: Callable[[], Tracker]) -> None:
    assert Tracking("X", history, start).close() is None


def test_a_tracker_is_told_what_happened_and_what_happens_from_then_on(
    search: RecordedSearch,
) -> None:
    tracker = Notebook()
    following = Tracking("X", search.history, lambda: tracker)
    assert tracker.is_up_to_date.wait(PATIENCE)
    assert tracker.notes == SO_FAR
    search.epoch(1, 0.9)
    search.end(1, "complete")
    search.start(lr=0.03)
    assert following.close() is None
    assert tracker.notes == [*SO_FAR, "epoch 1.2", "end 1 complete", "begin 2", "close"]


def test_epochs_that_are_there_already_are_not_told_again(search: RecordedSearch) -> None:
    tracker = Notebook(there=1)
    show(search.history, lambda: tracker)
    assert [note for note in tracker.notes if "epoch" in note] == ["epoch 0.2"]


@pytest.mark.parametrize("fails_at", ["begin 0", "epoch 0.2", "end 0 stopped"])
def test_after_a_failure_another_tracker_is_told_everything(
    search: RecordedSearch, fails_at: str
) -> None:
    first, second = Notebook(fails_at=fails_at), Notebook()
    makers = iter([first, second])
    following = Tracking("X", search.history, lambda: next(makers))
    assert second.is_up_to_date.wait(PATIENCE)
    assert following.close() is None
    assert first.notes[-1] == "close"
    assert second.notes == [*SO_FAR, "close"]


def test_one_that_fails_to_the_end_is_a_warning(search: RecordedSearch) -> None:
    following = Tracking("X", search.history, lambda: Notebook(fails_at="epoch 0.2"))
    why = "OSError: [Errno 28] No space left on device"
    assert following.close() == f"X has not got everything ({why}); epochs.csv has"


def shown(folder: Path, tag: str = "val_accuracy") -> dict[int, float]:
    found = EventAccumulator(str(folder)).Reload()
    if tag not in found.Tags()["scalars"]:
        return {}
    scalars = found.Scalars(tag)
    assert len({each.step for each in scalars}) == len(scalars)
    return {each.step: each.value for each in scalars}


def steps(folder: Path) -> list[int]:
    """Return the epoch of every measurement in a trial's one file."""
    (file,) = folder.iterdir()
    events = EventFileLoader(str(file)).Load()
    return [event.step for event in events if event.HasField("summary") and event.step]


def test_tensorboard_has_hyperparameters_and_finite_measurements_by_epoch(tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95, 0.97], lr=0.02)
    number = search.start()
    search.epoch(number, 0.9, val_accuracy=math.nan)
    search.diverged_epoch(number)
    show(search.history, lambda: EventFiles(search.folder.tensorboard))
    finite, other = (search.folder.tensorboard / name for name in "01")
    assert shown(finite) == pytest.approx({1: 0.9, 2: 0.95, 3: 0.97})
    assert shown(finite, "val_loss") == pytest.approx({1: 0.1, 2: 0.05, 3: 0.03})
    accumulator = EventAccumulator(str(finite)).Reload()
    began = search.history.trials[0].started_at
    times = [each.wall_time - began for each in accumulator.Scalars("val_loss")]
    assert times == pytest.approx([2.5, 5.0, 7.5])
    hparams = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"lr" in hparams
    assert b"onecycle" not in hparams
    assert shown(other) == {}
    assert set(shown(other, "test_accuracy")) == {1}
    assert set(shown(other, "seconds")) == {1, 2}


def test_written_again_an_event_file_only_grows(tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    number = search.start()
    search.epoch(number, 0.9)
    show(search.history, lambda: EventFiles(search.folder.tensorboard))
    (file,) = (search.folder.tensorboard / "0").iterdir()
    before = file.read_bytes()
    search.epoch(number, 0.95)
    show(History.load(search.folder), lambda: EventFiles(search.folder.tensorboard))
    assert file.read_bytes().startswith(before)
    assert steps(search.folder.tensorboard / "0") == [1, 2]
    search.end(number, "complete")
    damages: list[Callable[[bytes], bytes]] = [
        bytes,  # none: it is whole
        lambda content: content + b"more",
        lambda content: content[:-20],
        lambda content: content[:-100] + bytes(100),
    ]
    for damage in damages:
        content = file.read_bytes()
        file.write_bytes(damage(content))
        os.utime(file, (1, 1))
        show(History.load(search.folder), lambda: EventFiles(search.folder.tensorboard))
        assert (file.stat().st_mtime == 1) == (damage is bytes)
        assert file.read_bytes() == content
    shutil.rmtree(search.folder.tensorboard)
    search.folder.tensorboard.write_text("in the way")
    why = Tracking("X", search.history, lambda: EventFiles(search.folder.tensorboard)).close()
    assert why is not None
    assert why.startswith("X has not got everything (NotADirectoryError")


def test_event_files_do_not_make_a_runs_folder_anew(search: RecordedSearch) -> None:
    path = search.folder.path
    path.rename(path.with_name("moved"))
    with pytest.raises(FileNotFoundError):
        EventFiles(search.folder.tensorboard).begin(search.history.trials[0])
    assert not path.exists()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of MLflow's own; making one takes it seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    mlflow_tracker(uri, "run")
    return uri


def runs_in(uri: str, experiment: str) -> dict[str, Any]:
    client = MlflowClient(uri)
    known = client.get_experiment_by_name(experiment)
    assert known is not None
    runs = client.search_runs([known.experiment_id])
    found = {run.info.run_name: run for run in runs}
    assert len(found) == len(runs)
    return found


def logged(uri: str, run: Any, metric: str = "val_accuracy") -> dict[int, float]:
    points = MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    assert len({each.step for each in points}) == len(points)
    return {each.step: each.value for each in points}


def test_a_trial_is_an_mlflow_run_with_parameters_metrics_by_epoch_and_its_state(
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
    show(search.history, lambda: MlflowRuns(uri, "states"))
    stopped, diverged, failed = (runs_in(uri, "states")[f"trial {n}"] for n in records)
    asked = {**records[0].config.as_dict(), "seed": records[0].seed}
    assert stopped.data.params == {name: str(value) for name, value in asked.items()}
    assert logged(uri, stopped) == {1: 0.9, 2: 0.95}
    assert logged(uri, diverged) == {1: 0.9}
    assert logged(uri, diverged, "diverged_step") == {2: 33}
    states = [(each.info.status, each.data.tags["state"]) for each in (stopped, diverged, failed)]
    assert states == [("FINISHED", "stopped"), ("FINISHED", "diverged"), ("FAILED", "failed")]
    assert failed.data.tags["reason"] == "the worker died"
    search.history.rerun_trial(2, 0.0, ray_id="again", error="")
    search.epoch(2, 0.9)
    search.end(2, "complete")
    show(search.history, lambda: MlflowRuns(uri, "states"))
    again = runs_in(uri, "states")["trial 2"]
    assert (again.info.status, again.data.tags["state"]) == ("FINISHED", "complete")
    assert logged(uri, again) == {1: 0.9}


def test_a_resumed_search_continues_in_the_same_mlflow_runs(
    uri: str, search: RecordedSearch
) -> None:
    start = partial(MlflowRuns, uri, "resumed")
    show(search.history, start)
    assert runs_in(uri, "resumed")["trial 1"].info.status == "KILLED"
    for accuracy in (0.85, 0.88):
        search.epoch(1, accuracy)
    assert start().begin(search.history.trials[1]) == 1
    assert runs_in(uri, "resumed")["trial 1"].info.status == "RUNNING"
    search.end(1, "complete")
    show(search.history, start)
    runs = runs_in(uri, "resumed")
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert logged(uri, runs["trial 0"]) == {1: 0.9, 2: 0.95}
    assert logged(uri, runs["trial 1"]) == {1: 0.8, 2: 0.85, 3: 0.88}


@pytest.mark.slow
def test_trackers_have_every_epoch_of_a_killed_and_resumed_search_once(
    uri: str, searches: Searches
) -> None:
    script = Script(seconds=0.05, killed_once={1: (3,)}, notes=searches.path)
    options = ("--epochs", 9, "--max-concurrent", 2, "--mlflow", uri)
    driver = searches.start("run", "--trials", 6, *options, script=script)
    folder = searches.folder("run")
    driver.wait_until(lambda: epochs_in(folder) >= 8)
    driver.kill()
    again = searches.resume("run", "--mlflow", uri, script=script)
    assert again.wait() == 0, again.output
    assert "warning" not in again.output
    records, runs = history_of(folder).trials, runs_in(uri, "run")
    assert len(records) == 6
    for number, record in records.items():
        trial = folder / "tensorboard" / str(number)
        assert steps(trial) == [row.epoch for row in record.rows]
        values = {row.epoch: row.val_accuracy for row in record.rows}
        assert shown(trial) == pytest.approx(values)
        assert logged(uri, runs[f"trial {number}"]) == pytest.approx(values)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://here"])
def test_a_store_that_does_not_answer_is_refused_before_anything_starts(uri: str) -> None:
    with pytest.raises(ConfigError, match="no tracking server or store that answers"):
        mlflow_tracker(uri, "run")


def test_mlflow_is_not_needed_until_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        mlflow_tracker("sqlite:///mlflow.db", "run")
