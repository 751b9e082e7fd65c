"""A run is copied to a bucket or a shared folder, and resumed from there."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
from support.scripted import Script, packed, unpacked

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.runs.checkpoints import Checkpoints
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import COLUMNS, EpochRow, History, TrialRecord
from tune_mnist.tuning import launch, remote, sync
from tune_mnist.tuning.plan import Plan
from tune_mnist.tuning.remote import RemoteRun
from tune_mnist.tuning.settings import SearchSettings

pytest_plugins = ["support.ray_fixtures", "support.s3_server"]

TRIALS, EPOCHS, HELD = 5, 8, 5  # the epoch that the first trial is held before
ONE_BY_ONE = ("--max-concurrent", 1)
SHORT = ("--trials", TRIALS, "--epochs", EPOCHS, *ONE_BY_ONE)


def hurry(copy_every: float = 0.1) -> None:
    """Have this process be as impatient as tests are."""
    replace(remote, "PATIENCE", 1)
    replace(sync, "COPY_EVERY", copy_every)
    replace(sync, "CLOSING_PATIENCE", 1.0)
    replace(remote, "LEASE", 2.0)
    replace(remote, "SIGN_EVERY", 0.2)
    replace(remote, "LOOK_EVERY", 0.1)


def contents_of(folder: Path) -> dict[str, bytes]:
    """Return all that is copied of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
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
        *(s3.uri("runs/run"), "elsewhere", *ONE_BY_ONE), script=script, prepare=hurry
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


@pytest.mark.parametrize(
    ("bucket", "refuses", "error"),
    [
        ("s3://pail/", False, "cannot use s3://pail/runs/run"),  # it does not exist
        ("s3://bucket/", True, "cannot use s3://bucket/runs/run"),
        ("file:///proc/", False, "cannot use file:///proc/runs/run"),
        ("s3://bucket/", False, "the run s3://bucket/runs/run.* exists and is never overwritten"),
    ],
)
def test_storage_that_cannot_be_written_or_has_the_run_is_refused_before_anything_starts(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str, refuses: bool, error: str
) -> None:
    s3.refuses = refuses
    s3.objects["runs/run/search.yaml"] = b"asked: {}\n", 0.0
    uri = "file:///proc/runs" if "file" in bucket else s3.uri("runs")
    monkeypatch.setattr(remote, "PATIENCE", 1)
    monkeypatch.setattr(launch, "_runtime", None)
    with pytest.raises(RunFolderError, match=f"^{error}"):
        launch.search(
            SearchSettings(
                run="run", results_dir=tmp_path, storage=uri.replace("s3://bucket/", bucket)
            )
        )
    assert not list(tmp_path.iterdir())


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
    other = searches.resume_at(s3.uri("runs/run"), "elsewhere", *ONE_BY_ONE, prepare=hurry)
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
    for epoch in range(1, 7):
        for number in range(3):
            row = EpochRow(**epoch_metrics(epoch, 0.5).as_dict(), trial=number, elapsed=0.5)
            checkpoints.save_best(packed(f"{len(history.rows) + 1}"))
            checkpoints.save(history.trials[number], row, bytes(100_000))
            history.add_epoch(row)
            time.sleep(0.02)
    for number in range(3):
        history.end_trial(number, 0.0, "complete", "")
        checkpoints.remove(number)
        history.start_trial(TrialRecord(3 + number, TrainConfig(), 0, "sampled"), 0.0)
        history.add_epoch(dataclasses.replace(row, trial=3 + number, epoch=1))


@pytest.mark.usefixtures("rounds")
def test_a_copy_can_be_resumed_at_every_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copy = copied_run(tmp_path, b"", b"")
    lock, original, instants = threading.Lock(), RemoteRun.write, list[Path]()

    def write(remote: RemoteRun, name: str, content: bytes) -> None:
        with lock:
            original(remote, name, content)
            instants.append(tmp_path / "instants" / str(len(instants)) / "run")
            shutil.copytree(copy.path, instants[-1])

    monkeypatch.setattr(RemoteRun, "write", write)
    with kept_in_line(folder, copy):
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
        best = int(unpacked(fetched.best_model)) if fetched.best_model.exists() else 0
        assert best >= min(len(history.rows), 18)
        for record in history.unfinished():
            state = Checkpoints(fetched).load(record)
            # One ahead: lost between checkpoint and row, which the checkpoint holds.
            assert state is None or state.row.epoch <= record.epochs + 1
    assert len(seen) > 3, seen


def start(trial: int) -> bytes:
    facts = {"ray_id": "", "origin": "sampled", "seed": 0, "config": TrainConfig().as_dict()}
    event = {"event": "start", "time": 0.0, "trial": trial, "elapsed": 0.0, **facts}
    return f"{json.dumps(event)}\n".encode()


def row(trial: int, epoch: int) -> bytes:
    metrics = epoch_metrics(epoch, 0.5).as_dict()
    return f"{EpochRow(**metrics, trial=trial, elapsed=0.5).line()}\n".encode()


HEADER = f"{','.join(COLUMNS)}\n".encode()
ROWS = HEADER + row(0, 1), row(0, 2), row(1, 1)
ALL = b"".join(ROWS)
ONE, TWO = start(0), start(0) + start(1)
END = b"""\
{"event": "end", "time": 0.0, "trial": 0, "elapsed": 0.0, "state": "complete", "reason": ""}
"""


def make_run(folder: Path, events: bytes = b"", epochs: bytes = b"") -> RunFolder:
    (folder / "checkpoints").mkdir(parents=True)
    run = RunFolder(folder)
    Plan.of(SearchSettings(space="sgd")).save(run)
    run.events.write_bytes(events)
    run.epochs.write_bytes(epochs)
    return run


def copied_run(
    path: Path, events: bytes = ONE, epochs: bytes = ROWS[0]
) -> tuple[RunFolder, RunFolder]:
    """Return a run and where its copy is to lie."""
    there = RunFolder(path / "there" / "run")
    sync.check_new_copy(RemoteRun(there.path.as_uri()))
    return make_run(path / "run", events, epochs), there


@contextlib.contextmanager
def kept_in_line(folder: RunFolder, there: RunFolder, begins: bool = True) -> Iterator[None]:
    with sync.copied(folder, RemoteRun(there.path.as_uri())) as copying:
        if begins:
            copying.begin()
        yield


def test_a_folder_that_is_behind_its_copy_is_caught_up(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", TWO, ALL)
    folder = make_run(tmp_path / "run", ONE, ROWS[0] + b"0,")
    with kept_in_line(folder, there):
        assert folder.epochs.read_bytes() == ALL
        assert folder.events.read_bytes() == TWO


def test_what_only_the_copy_has_is_fetched(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", ONE, ROWS[0] + ROWS[1])
    (there.checkpoints / "00000.state").write_bytes(b"of an unfinished trial")
    there.best_model.write_bytes(packed("of epoch 2"))
    folder = make_run(tmp_path / "run", ONE, ROWS[0] + ROWS[1])
    folder.checkpoints.rmdir()  # as Git and zip do
    with kept_in_line(folder, there, begins=False):
        assert contents_of(folder.path) == contents_of(there.path)


def test_a_copy_that_is_behind_its_folder_is_caught_up(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", ONE, ROWS[0])
    folder = make_run(tmp_path / "run", TWO + END, ALL)
    (there.checkpoints / "00000.state").write_bytes(b"of a trial that has ended")
    with kept_in_line(folder, there):
        assert not list(folder.checkpoints.iterdir())
    assert contents_of(there.path) == contents_of(folder.path)


def test_epochs_of_trials_whose_start_was_not_copied_are_run_again(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", ONE, ALL)
    folder = sync.folder_for(RemoteRun(there.path.as_uri()), tmp_path)
    with kept_in_line(folder, there):
        assert folder.epochs.read_bytes() == ROWS[0] + ROWS[1]


def test_a_run_that_was_resumed_in_both_places_is_refused(tmp_path: Path) -> None:
    there = make_run(tmp_path / "there" / "run", TWO, ALL)
    folder = make_run(tmp_path / "run", ONE, ROWS[0] + ROWS[1] + row(0, 3))
    before = contents_of(there.path)
    with (
        pytest.raises(RunFolderError, match="resumed in both places"),
        kept_in_line(folder, there),
    ):
        pass
    assert contents_of(there.path) == before


def test_what_is_no_copy_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run's copy: it has no search\.yaml"):
        sync.folder_for(RemoteRun((tmp_path / "there" / "nothing").as_uri()), tmp_path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("events.jsonl", lambda content: content + b"{}\n"),
        ("epochs.csv", lambda content: content + b"0,3\n"),
        ("search.yaml", lambda content: content[:99]),
        ("search.yaml", lambda _: b""),
    ],
)
def test_a_damaged_copy_is_not_fetched(
    tmp_path: Path, file: str, damage: Callable[[bytes], bytes]
) -> None:
    there = make_run(tmp_path / "there" / "run", ONE, ROWS[0] + ROWS[1])
    folder = make_run(tmp_path / "run", ONE, ROWS[0])
    (there.path / file).write_bytes(damage((there.path / file).read_bytes()))
    before = contents_of(folder.path), contents_of(there.path)
    with (
        pytest.raises(RunFolderError, match=f"nothing was fetched: {there.path.as_uri()}/{file}"),
        kept_in_line(folder, there),
    ):
        pass
    assert (contents_of(folder.path), contents_of(there.path)) == before
    assert not (there.path / ".driver").exists()


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a round of copying every few milliseconds."""
    monkeypatch.setattr(sync, "COPY_EVERY", 0.005)
    monkeypatch.setattr(sync, "COPY_LOAD", 1.0)
    monkeypatch.setattr(sync, "CLOSING_PATIENCE", 60.0)


def wait_for_copy(folder: RunFolder, there: RunFolder) -> None:
    deadline = time.monotonic() + 60
    while contents_of(there.path) != contents_of(folder.path):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))


def replaced_by_an_empty_one(path: Path) -> None:
    moved(path)
    path.mkdir()


def cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, length)


def removed(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def rewritten(name: str, content: bytes) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        (path / name).write_bytes(content)

    return rewrite


def linked_to_a_file_of_ones_own(path: Path) -> None:
    private = path.parent / "private"
    private.write_bytes(packed("mine"))
    (path / "best.pt").unlink()
    (path / "best.pt").symlink_to(private)


def save_state(folder: RunFolder, number: int, state: bytes) -> None:
    record = TrialRecord(number, TrainConfig(), 0, "sampled")
    Checkpoints(folder).save(record, EpochRow.parse(row(number, 1).decode()), state)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (moved, "is no longer the folder"),
        (shutil.rmtree, "warning"),  # which one depends on how much of it is left when seen
        (replaced_by_an_empty_one, "is no longer the folder"),
        (removed("events.jsonl"), "does not continue its copy"),
        (removed("epochs.csv"), "does not continue its copy"),
        (cut("events.jsonl", 0), "does not continue its copy"),
        (cut("epochs.csv", 90), "does not continue its copy"),
        (rewritten("epochs.csv", HEADER + row(0, 2)), "does not continue its copy"),
        (rewritten("confirm/epochs.csv", HEADER), "does not continue its copy"),
        (removed("search.yaml"), ""),
        (cut("search.yaml", 0), ""),
        (cut("search.yaml", 99), ""),
        (removed("best.pt"), ""),
        (cut("best.pt", 0), ""),
        (cut("best.pt", 100), ""),
        (rewritten("best.pt", bytes(1000)), ""),
        (linked_to_a_file_of_ones_own, ""),
        (removed("trials.csv"), ""),
        (removed("checkpoints/00001.state"), ""),
        (cut("checkpoints/00001.state", 100), ""),
        (cut("checkpoints/00001.state", 0), ""),
        (lambda path: shutil.rmtree(path / "checkpoints"), ""),
        (lambda path: shutil.rmtree(path / "confirm"), "does not continue its copy"),
    ],
)
@pytest.mark.usefixtures("rounds")
def test_whatever_happens_to_the_folder_the_copy_keeps_what_it_has(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    folder, there = copied_run(tmp_path, TWO, ALL)
    make_run(folder.path / "confirm", ONE, ROWS[0] + ROWS[1])
    save_state(folder, 1, bytes(1000))
    folder.best_model.write_bytes(packed("whole"))
    folder.trials.write_bytes(b"whole")
    with kept_in_line(folder, there):
        wait_for_copy(folder, there)
        before = contents_of(there.path)
        damage(folder.path)
        time.sleep(0.03)  # a few rounds, beside the last one
    assert contents_of(there.path) == before
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert all(said and said in line for line in warnings)
    assert bool(warnings) == bool(said)
    assert not (there.path / ".driver").exists()


@pytest.mark.usefixtures("rounds")
def test_states_of_trials_that_have_ended_are_deleted_in_the_copy(tmp_path: Path) -> None:
    folder, there = copied_run(tmp_path, TWO, ALL)
    for number in (0, 1):
        save_state(folder, number, b"state")
    with kept_in_line(folder, there):
        wait_for_copy(folder, there)
        with folder.events.open("ab") as events:
            events.write(END)
        shutil.rmtree(folder.checkpoints)
    assert [path.name for path in there.checkpoints.iterdir()] == ["00001.state"]


@pytest.mark.usefixtures("rounds")
def test_a_confirmation_that_was_put_aside_is_copied_before_another_takes_its_place(
    tmp_path: Path,
) -> None:
    folder, there = copied_run(tmp_path)
    make_run(folder.path / "confirm", ONE, ROWS[0] + ROWS[1])
    for again in ("during a session", "between two"):
        with kept_in_line(folder, there):
            wait_for_copy(folder, there)
            if again == "during a session":
                (folder.path / "confirm").rename(folder.path / "confirm-1")
                make_run(folder.path / "confirm", ONE, HEADER)
        if again == "between two":
            (folder.path / "confirm").rename(folder.path / "confirm-2")
    with kept_in_line(folder, there):
        make_run(folder.path / "confirm", TWO, ALL)
        wait_for_copy(folder, there)


@pytest.mark.usefixtures("rounds")
def test_a_storage_that_comes_back_empty_gets_everything_again(tmp_path: Path) -> None:
    folder, there = copied_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "SIGN_EVERY", 0.0)
        with kept_in_line(folder, there):
            wait_for_copy(folder, there)
            there.path.rename(tmp_path / "away")
            time.sleep(0.05)
            assert not there.path.exists()
            there.path.mkdir()
            wait_for_copy(folder, there)


@pytest.mark.usefixtures("rounds")
def test_a_copy_that_another_driver_took_over_and_left_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "SIGN_EVERY", 0.0)
    there = make_run(tmp_path / "there" / "run", ONE, ROWS[0])
    folder = make_run(tmp_path / "run", ONE, ROWS[0])
    with kept_in_line(folder, there):
        wait_for_copy(folder, there)
        there.epochs.write_bytes(ROWS[0] + ROWS[1])
        (there.path / ".driver").unlink()
        time.sleep(0.05)
        folder.epochs.write_bytes(ROWS[0] + row(0, 3))
    assert there.epochs.read_bytes() == ROWS[0] + ROWS[1]
    assert "is left to another driver" in capsys.readouterr().out


def test_a_copy_never_has_an_epoch_without_the_model_that_was_best_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, there = copied_run(tmp_path, ONE, HEADER)
    listed, written = sync._files, RemoteRun.write

    def list_files(of: RunFolder) -> Iterator[Path]:
        """List them, and have another epoch come to its end before any is read."""
        yield from list(listed(of))
        epoch = folder.epochs.read_bytes().count(b"\n")
        folder.best_model.write_bytes(packed(f"{epoch}"))
        with folder.epochs.open("ab") as epochs:
            epochs.write(row(0, epoch))

    def write(copy: RemoteRun, name: str, content: bytes) -> None:
        written(copy, name, content)
        if name == "epochs.csv":
            epochs = content.count(b"\n") - 1
            assert epochs == 0 or int(unpacked(there.best_model)) >= epochs

    monkeypatch.setattr(sync, "_files", list_files)
    monkeypatch.setattr(RemoteRun, "write", write)
    with kept_in_line(folder, there):
        pass
    assert there.epochs.read_bytes().count(b"\n") > 1
