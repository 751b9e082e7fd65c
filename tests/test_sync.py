"""A run is copied to a bucket or a shared folder, and resumed from there."""

import dataclasses
import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.course import Course
from support.drivers import (
    Driver,
    Searches,
    history_of,
    notes_of,
    outcome,
    outcome_of,
    replace,
    study_of,
)
from support.epochs import epoch_metrics
from support.s3_server import S3
from support.scripted import Script

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import EpochRow, History, TrialRecord
from tune_mnist.tuning import remote, sync
from tune_mnist.tuning.remote import RemoteRun

pytest_plugins = ["support.ray_fixtures", "support.s3_server"]

TRIALS, EPOCHS, HELD = 5, 8, 5  # the epoch that the first trial is held before
ONE = ("--max-concurrent", 1)
SHORT = ("--trials", TRIALS, "--epochs", EPOCHS, *ONE)


def hurry(copy_every: float = 0.1) -> None:
    """Have this process be as impatient as tests are."""
    replace(remote, "PATIENCE", 1)
    replace(sync, "COPY_EVERY", copy_every)
    replace(sync, "CLOSING_PATIENCE", 1.0)
    replace(sync, "LEASE", 2.0)
    replace(sync, "SIGN_EVERY", 0.2)
    replace(sync, "LOOK_EVERY", 0.1)


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return all that is copied of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not name.startswith(".") and not name.endswith(".before.state")
    }


def begin(
    searches: Searches, s3: S3, prepare: Callable[[], None] = hurry
) -> tuple[Driver, Script]:
    """Begin a search whose first trial is held, with all that it did before in its copy."""
    script = Script(seconds=0.0, notes=searches.notes, state_size=300_000, held={0: (HELD,)})
    driver = searches.start(
        *("run", *SHORT, "--storage", s3.uri("runs")), script=script, prepare=prepare
    )
    driver.wait_until(lambda: copied_epoch(s3) == HELD - 1)
    return driver, script


def copied_epoch(s3: S3) -> int:
    """Return the epoch of the first trial's state in the bucket."""
    state, _ = s3.objects.get("runs/run/checkpoints/00000.state", (b"", 0.0))
    header, _, _ = state.partition(b"\n")
    return int(json.loads(header)["row"]["epoch"]) if header else 0


@pytest.mark.slow
def test_a_run_whose_machine_is_lost_is_resumed_from_its_bucket(
    searches: Searches, s3: S3, tmp_path: Path
) -> None:
    driver, script = begin(searches, s3)
    driver.kill()
    assert "runs/run/study.db" not in s3.objects
    shutil.rmtree(searches.folder("run"))
    script.release()

    driver = searches.resume_at(
        *(s3.uri("runs/run"), "elsewhere", *ONE), script=script, prepare=hurry
    )
    assert driver.wait() == 0, driver.output
    folder = searches.path / "elsewhere" / "run"
    unbroken = Course(tmp_path / "unbroken", trials=TRIALS, epochs=EPOCHS, startup_trials=10)
    unbroken.run(until=TRIALS)
    assert outcome_of(folder) == outcome(unbroken.history)
    assert (folder / "best.pt").read_bytes() == unbroken.folder.best_model.read_bytes()
    trained = notes_of(searches.notes)
    assert trained.total() - len(trained) <= 1  # which the lost driver's worker was held in
    assert contents_of(folder) == s3.contents("runs/run")
    assert len(study_of(folder)) == TRIALS


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
def test_a_bucket_that_fails_delays_nothing_and_is_caught_up(
    searches: Searches, s3: S3, answers: bool
) -> None:
    driver, script = begin(searches, s3)
    if answers:
        s3.refuses = True
    else:
        s3.answers.clear()
    script.release()
    assert driver.wait(60) == 0, driver.output
    folder = searches.folder("run")
    last = driver.output.splitlines()[-1]
    assert "is behind" in last
    assert last.endswith(f"--resume {folder} brings it up to date")
    if answers:
        assert "ACCESS_DENIED" in last
        assert driver.output.count("warning: cannot copy to s3://bucket/runs/run") == 1
    assert not history_of(folder).unfinished()

    s3.refuses = False
    s3.answers.set()
    driver = searches.resume("run", prepare=hurry)
    assert driver.wait() == 0, driver.output
    assert contents_of(folder) == s3.contents("runs/run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bucket", "refuses", "error"),
    [
        ("s3://pail/", False, "cannot use s3://pail/runs/run"),  # it does not exist
        ("s3://bucket/", True, "cannot use s3://bucket/runs/run"),
        ("file:///proc/", False, "cannot use file:///proc/runs/run"),
        ("s3://bucket/", False, "the run s3://bucket/runs/run"),  # it exists
    ],
)
def test_storage_that_cannot_be_written_or_has_the_run_is_refused_before_anything_starts(
    searches: Searches, s3: S3, bucket: str, refuses: bool, error: str
) -> None:
    s3.refuses = refuses
    s3.objects["runs/run/search.yaml"] = b"asked: {}\n", 0.0
    uri = "file:///proc/runs" if "file" in bucket else s3.uri("runs")
    uri = uri.replace("s3://bucket/", bucket)
    driver = searches.start("run", "--storage", uri, prepare=hurry)
    assert driver.wait() == 2, driver.output
    (line,) = driver.output.splitlines()
    assert line.startswith(f"error: {error}")
    assert ("exists and is never overwritten" in line) == error.startswith("the run")
    assert not searches.folder("run").exists()


@pytest.mark.slow
def test_of_two_drivers_on_one_copy_the_second_is_refused(searches: Searches, s3: S3) -> None:
    driver, _ = begin(searches, s3)
    other = searches.resume_at(s3.uri("runs/run"), "elsewhere", prepare=hurry)
    assert other.wait() == 2, other.output
    assert "is in use: a search on" in other.output
    driver.send(signal.SIGTERM)
    assert driver.wait() == 128 + signal.SIGTERM, driver.output
    assert contents_of(searches.folder("run")) == s3.contents("runs/run")


@pytest.mark.slow
def test_a_driver_that_was_taken_for_dead_leaves_the_copy_to_its_successor(
    searches: Searches, s3: S3
) -> None:
    driver, script = begin(searches, s3, partial(hurry, copy_every=1.0))
    signs = s3.puts.count("runs/run/.driver")
    driver.wait_until(lambda: s3.puts.count("runs/run/.driver") > signs)
    time.sleep(0.4)  # nothing of the round is under way any more
    driver.send(signal.SIGSTOP)
    script.release()
    other = searches.resume_at(s3.uri("runs/run"), "elsewhere", *ONE, prepare=hurry)
    assert other.wait() == 0, other.output
    driver.send(signal.SIGCONT)
    driver.send(signal.SIGTERM)
    assert driver.wait() == 128 + signal.SIGTERM, driver.output
    assert "is left to another driver" in driver.output.splitlines()[-1]
    assert contents_of(searches.path / "elsewhere" / "run") == s3.contents("runs/run")


def search_alone(folder: RunFolder) -> None:
    """Write what a search of three trials does, in its order, as fast as it can be written."""
    history, checkpoints = History(folder), Checkpoints(folder)
    history.open_session({})
    for number in range(3):
        history.start_trial(TrialRecord(number, TrainConfig(), number, "sampled"), 0.0)
    for epoch in range(1, 11):
        for number in range(3):
            row = EpochRow(**epoch_metrics(epoch, 0.5).as_dict(), trial=number, elapsed=0.5)
            checkpoints.save_best(f"{len(history.rows) + 1}".encode())
            checkpoints.save(number, row, bytes(100_000))
            history.add_epoch(row)
            time.sleep(0.02)
    for number in range(3):
        history.end_trial(number, 0.0, "complete", "")
        checkpoints.remove(number)
        history.start_trial(TrialRecord(3 + number, TrainConfig(), 0, "sampled"), 0.0)
        history.add_epoch(dataclasses.replace(row, trial=3 + number, epoch=1))


def test_a_copy_can_be_resumed_at_every_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "COPY_EVERY", 0.005)
    monkeypatch.setattr(sync, "COPY_LOAD", 1.0)
    folder, copy = make_run(tmp_path / "run"), tmp_path / "there" / "run"
    lock, original, instants = threading.Lock(), RemoteRun.write, list[Path]()

    def write(remote: RemoteRun, name: str, content: bytes) -> None:
        with lock:
            original(remote, name, content)
            instants.append(tmp_path / "instants" / str(len(instants)) / "run")
            shutil.copytree(copy, instants[-1])

    monkeypatch.setattr(RemoteRun, "write", write)
    with sync.kept_in_line(folder, RemoteRun(copy.as_uri())):
        search_alone(folder)
    monkeypatch.undo()
    seen = Counter[int]()
    for number, instant in enumerate(instants):
        if not (instant / "search.yaml").exists():
            continue  # no run yet
        remote = RemoteRun(instant.as_uri())
        fetched = sync.folder_for(remote, tmp_path / "fetched" / str(number))
        sync.fetch_newer(fetched, remote)
        history = History.load(fetched)
        seen[len(history.rows)] += 1
        best = int(fetched.best_model.read_bytes()) if fetched.best_model.exists() else 0
        assert best >= min(len(history.rows), 30)
        for record in history.unfinished():
            state = Checkpoints(fetched).load(record.number)
            # One ahead: lost between checkpoint and row, which the checkpoint holds.
            assert state is None or state.row.epoch <= record.epochs + 1
    assert len(seen) > 3, seen


START = b'{"event": "start", "trial": %d}\n'
ROWS = b"trial,epoch\n0,1\n", b"0,2\n", b"1,1\n"


def make_run(folder: Path, events: bytes = b"", epochs: bytes = b"") -> RunFolder:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "search.yaml").write_text("asked: {}\n")
    (folder / "events.jsonl").write_bytes(events)
    (folder / "epochs.csv").write_bytes(epochs)
    return RunFolder(folder)


def test_a_folder_that_is_behind_its_copy_is_caught_up(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", START % 0 + START % 1, b"".join(ROWS))
    folder = make_run(tmp_path / "run", START % 0, ROWS[0] + b"0,")
    with sync.kept_in_line(folder, RemoteRun(there.path.as_uri())):
        assert folder.epochs.read_bytes() == b"".join(ROWS)
        assert folder.events.read_bytes() == START % 0 + START % 1


def test_a_copy_that_is_behind_its_folder_is_caught_up(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", START % 0, ROWS[0])
    (there.checkpoints / "00000.state").write_bytes(b"of a trial that has ended")
    folder = make_run(tmp_path / "run", START % 0 + START % 1, b"".join(ROWS))
    with sync.kept_in_line(folder, RemoteRun(there.path.as_uri())):
        pass
    assert contents_of(there.path) == contents_of(folder.path)


def test_epochs_of_trials_whose_start_was_not_copied_are_run_again(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", START % 0, b"".join(ROWS))
    copy = RemoteRun(there.path.as_uri())
    folder = sync.folder_for(copy, tmp_path)
    with sync.kept_in_line(folder, copy):
        assert folder.epochs.read_bytes() == b"".join(ROWS[:2])


def test_a_run_that_was_resumed_in_both_places_is_refused(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", START % 0 + START % 1, b"".join(ROWS))
    folder = make_run(tmp_path / "run", START % 0, b"".join(ROWS[:2]) + b"0,3\n")
    before = contents_of(there.path)
    with (
        pytest.raises(RunFolderError, match="resumed in both places"),
        sync.kept_in_line(folder, RemoteRun(there.path.as_uri())),
    ):
        pass
    assert contents_of(there.path) == before


def test_what_is_no_copy_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run's copy: it has no search\.yaml"):
        sync.folder_for(RemoteRun((tmp_path / "nothing").as_uri()), tmp_path)
