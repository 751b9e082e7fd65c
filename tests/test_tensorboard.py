import math
import shutil
from pathlib import Path

import pytest
from support.drivers import Searches, epochs_in, history_of
from support.recorded import RecordedSearch
from support.scripted import Script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.tuning.trackers import EventFiles

pytest_plugins = ["support.ray_fixtures"]


def _shown(folder: Path, tag: str = "val_accuracy") -> dict[int, float]:
    """Return what TensorBoard draws of a trial, by epoch."""
    found = EventAccumulator(str(folder)).Reload()
    if tag not in found.Tags()["scalars"]:
        return {}
    scalars = found.Scalars(tag)
    assert len({each.step for each in scalars}) == len(scalars)
    return {each.step: each.value for each in scalars}


def _steps(folder: Path) -> list[int]:
    """Return the epoch of every measurement in a trial's one file."""
    (file,) = folder.iterdir()
    events = EventFileLoader(str(file)).Load()
    return [event.step for event in events if event.HasField("summary") and event.step]


def _write(folder: Path, *records: TrialRecord) -> None:
    files = EventFiles(folder)
    for record in records:
        assert files.begin(record) == 0
        for row in record.rows:
            files.add_epoch(record, row)
        files.flush()
        if record.state != "running":
            files.end(record)
    files.close()


def test_a_trial_has_its_measurements_by_epoch_and_its_hyperparameters(tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95, 0.97], lr=0.02)
    record = search.history.trials[0]
    _write(search.folder.tensorboard, record)
    folder = search.folder.tensorboard / "0"
    assert _shown(folder) == pytest.approx({1: 0.9, 2: 0.95, 3: 0.97})
    assert _shown(folder, "val_loss") == pytest.approx({1: 0.1, 2: 0.05, 3: 0.03})
    accumulator = EventAccumulator(str(folder)).Reload()
    times = [each.wall_time - record.started_at for each in accumulator.Scalars("val_loss")]
    assert times == pytest.approx([2.5, 5.0, 7.5])
    hparams = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"lr" in hparams
    assert b"onecycle" not in hparams


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    number = search.start()
    search.epoch(number, 0.9, val_accuracy=math.nan)
    search.diverged_epoch(number)
    _write(search.folder.tensorboard, search.history.trials[number])
    folder = search.folder.tensorboard / "0"
    assert _shown(folder) == {}
    assert set(_shown(folder, "test_accuracy")) == {1}
    assert set(_shown(folder, "seconds")) == {1, 2}


def test_written_again_a_file_only_grows(tmp_path: Path) -> None:
    search = RecordedSearch(tmp_path)
    number = search.start()
    search.epoch(number, 0.9)
    _write(search.folder.tensorboard, search.history.trials[number])
    (file,) = (search.folder.tensorboard / "0").iterdir()
    before = file.read_bytes()
    search.epoch(number, 0.95)
    _write(search.folder.tensorboard, History.load(search.folder).trials[number])
    assert file.read_bytes().startswith(before)
    assert _steps(search.folder.tensorboard / "0") == [1, 2]


def test_a_search_that_was_killed_and_resumed_has_every_epoch_once(searches: Searches) -> None:
    script = Script(seconds=0.05, killed_once={1: (3,)}, notes=searches.path)
    options = ("--trials", 6, "--epochs", 9, "--max-concurrent", 2)
    driver = searches.start("run", *options, script=script)
    driver.wait_until(lambda: epochs_in(searches.folder("run")) >= 8)
    driver.kill()
    folder = searches.folder("run")
    again = searches.resume("run", script=script)
    assert again.wait() == 0, again.output
    assert "warning" not in again.output
    records = history_of(folder).trials
    assert len(records) == 6
    for record in records.values():
        trial = folder / "tensorboard" / str(record.number)
        assert _steps(trial) == [row.epoch for row in record.rows]
        values = {row.epoch: row.val_accuracy for row in record.rows}
        assert _shown(trial) == pytest.approx(values)


def test_a_search_whose_event_files_cannot_be_written_says_so_and_ends_well(
    searches: Searches,
) -> None:
    first = searches.start("run", "--trials", 1)
    assert first.wait() == 0, first.output
    folder = searches.folder("run")
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").write_text("in the way")
    second = searches.resume("run", "--trials", 3)
    assert second.wait() == 0, second.output
    assert "warning: TensorBoard has not got everything (NotADirectoryError" in second.output
    states = {record.state for record in history_of(folder).trials.values()}
    assert states <= {"complete", "stopped"}
