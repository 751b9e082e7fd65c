"""`study.db` equals the study in memory, whatever happens to the file."""

import contextlib
import random
import shutil
import sqlite3
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from support.disks import mounted
from support.drivers import fork
from support.processes import running
from support.small_study import SmallStudy, count_trials, wait_for

from tune_mnist.tuning import study_file
from tune_mnist.tuning.study_file import facts, is_sound

HOLD = """
import sqlite3, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(sys.argv[2])
connection.execute("SELECT count(*) FROM trials").fetchall()
print(flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_file, "WRITE_EVERY", 0.02)
    monkeypatch.setattr(study_file, "RETRY_AFTER", 0.1)
    monkeypatch.setattr(study_file, "CLOSING_PATIENCE", 60.0)
    monkeypatch.setattr(study_file, "_AT_ONCE", 30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


def in_file(path: Path) -> list[FrozenTrial]:
    with tempfile.TemporaryDirectory() as folder:  # one whose name any URL can hold
        copied = Path(shutil.copy(path, folder))
        study = optuna.load_study(study_name="tune_mnist", storage=f"sqlite:///{copied}")
        assert study.direction == optuna.study.StudyDirection.MAXIMIZE
        assert study.metric_names == ["val_accuracy"]
        return study.get_trials()


def close_and_compare(search: SmallStudy) -> None:
    """End a search and see that its file says what the study says."""
    assert search.study.close() is None
    found, expected = in_file(search.path), search.study.trials()
    assert [(each.number, facts(each)) for each in found] == [
        (each.number, facts(each)) for each in expected
    ]
    assert TrialState.RUNNING not in {trial.state for trial in found}


def written(path: Path, steps: int) -> SmallStudy:
    search = SmallStudy(path)
    search.steps(steps)
    search.wait_until_written()
    return search


def closed(path: Path, steps: int, seed: int = 0) -> SmallStudy:
    search = SmallStudy(path, seed)
    search.steps(steps)
    close_and_compare(search)
    return search


def aside(path: Path, why: str) -> Path:
    return path.with_name(f"study.db.{why}")


def alter(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(statement)


def spoil(path: Path, how: str) -> None:
    before = path.read_bytes()
    noise = random.Random(0).randbytes(len(before))
    match how:
        case "deleted":
            path.unlink()
        case "middle":
            path.write_bytes(before[:4096] + noise[8192:] + before[-4096:])
        case "with a journal":
            path.write_bytes(b"no database" * 1000)
            header = b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7"  # SQLite's of a journal
            path.with_name("study.db-journal").write_bytes(header + b"x" * 99)
        case _:
            cut = before[: len(before) // 2]
            spoilt = {"random": noise, "cut": cut, "empty": b"", "text": b"a text\n" * 1000}
            path.write_bytes(spoilt[how])


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_the_file_says_what_the_study_in_memory_says_over_several_sessions(
    path: Path, seed: int
) -> None:
    earlier: list[FrozenTrial] = []
    inodes = set()
    for session in range(3):
        search = SmallStudy(path, 3 * seed + session, earlier)
        for _ in range(3):
            search.steps(15)
            search.wait_until_written()
        close_and_compare(search)
        inodes.add(path.stat().st_ino)
        earlier = search.recorded()
    assert len(inodes) == 1
    assert [each.name for each in path.parent.iterdir()] == ["study.db"]


@pytest.mark.parametrize(
    ("name", "trials"), [("größe, with space", 15), ("a?b=c#d%20{x}", 15), ("it's\"so\\", 0)]
)
def test_any_folder_name_and_number_of_trials_will_do(
    tmp_path: Path, name: str, trials: int
) -> None:
    path = tmp_path / name / "study.db"
    path.parent.mkdir()
    closed(path, trials)
    assert is_sound(path)
    spoil(path, "random")
    assert not is_sound(path)
    assert [path.name for path in tmp_path.rglob("*")] == [name, "study.db"]


@pytest.mark.parametrize("how", ["BEGIN EXCLUSIVE", "BEGIN"])
def test_a_reader_who_locks_the_file_delays_nothing_and_loses_nothing(
    path: Path, how: str
) -> None:
    search = written(path, 10)
    with running(HOLD, path, how):
        start = time.monotonic()
        for _ in range(50):
            search.steps(1)
            time.sleep(0.002)
        assert time.monotonic() - start < 50 * study_file.LOCK_TIMEOUT / 2  # none waits for it
        if how == "BEGIN":
            assert count_trials(path) < len(search.study.trials())
    close_and_compare(search)


def test_a_file_that_stays_locked_or_cannot_be_opened_ends_in_a_reason_within_bounds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_file, "CLOSING_PATIENCE", 0.5)
    monkeypatch.setattr(study_file, "LOCK_TIMEOUT", 0.1)
    search = written(path, 30)
    with running(HOLD, path, "BEGIN EXCLUSIVE"):
        search.report(search.live[0])
        for _ in range(2):
            assert search.study.close() == "database is locked"
    close_and_compare(SmallStudy(path, earlier=search.recorded()))
    nowhere = SmallStudy(path.parent / "gone" / "study.db")
    nowhere.steps(5)
    assert nowhere.study.close() == "unable to open database file"


@pytest.mark.parametrize("how", ["deleted", "random", "cut", "empty"])
def test_a_file_spoilt_in_mid_search_is_written_anew(path: Path, how: str) -> None:
    search = written(path, 30)
    spoil(path, how)
    search.steps(10)
    search.wait_until_written()
    if how == "deleted":
        path.unlink()  # and once more, with nothing left to write
    close_and_compare(search)


@pytest.mark.parametrize("how", ["middle", "text", "with a journal"])
def test_a_file_spoilt_before_a_resume_is_put_aside_and_written_anew(path: Path, how: str) -> None:
    search = closed(path, 60)
    spoil(path, how)
    spoilt = path.read_bytes()
    close_and_compare(SmallStudy(path, 1, earlier=search.recorded()))
    assert aside(path, "damaged").read_bytes() == spoilt


def test_a_file_that_says_otherwise_of_a_finished_trial_is_put_aside(path: Path) -> None:
    kept = [facts(trial) for trial in closed(path, 40, seed=1).study.trials()]
    closed(path, 40, seed=2)
    assert [facts(trial) for trial in in_file(aside(path, "outdated"))] == kept


@pytest.mark.parametrize(
    "change",
    [
        "trial_params SET param_value = 0.123 WHERE param_name = 'lr'",
        "trial_intermediate_values SET intermediate_value = 0.123",
        "alembic_version SET version_num = 'v2.4.0.a'",  # tables of another Optuna
    ],
)
def test_a_file_that_says_otherwise_of_a_running_trial_is_put_aside(
    path: Path, change: str
) -> None:
    search = SmallStudy(path)
    search.report(search.start())
    close_and_compare(search)
    alter(path, f"UPDATE {change}")
    close_and_compare(SmallStudy(path, earlier=search.recorded()))
    assert aside(path, "outdated").exists()


def test_a_user_can_load_the_study_in_mid_search_and_a_trial_that_they_add_goes_aside(
    path: Path,
) -> None:
    search = written(path, 40)
    study = optuna.load_study(study_name="tune_mnist", storage=f"sqlite:///{path}")
    assert len(study.trials) == len(search.study.trials())
    assert study.best_value > 0
    assert set(study.trials_dataframe()["state"]) >= {"RUNNING", "COMPLETE"}
    study.ask()
    for _ in range(3):
        search.start()
    search.steps(40)
    close_and_compare(search)
    assert aside(path, "outdated").exists()
    # As when a kill came before the trial's start was in the history.
    close_and_compare(SmallStudy(path, earlier=search.recorded()[:-1]))


def test_what_a_user_notes_on_a_trial_stays(path: Path) -> None:
    search = SmallStudy(path)
    search.end(search.start())
    close_and_compare(search)
    columns, values = "trial_id, key, value_json", "1, 'note', '\"look at this\"'"
    alter(path, f"INSERT INTO trial_user_attributes ({columns}) VALUES ({values})")
    resumed = SmallStudy(path, earlier=search.recorded())
    resumed.steps(5)
    assert resumed.study.close() is None
    assert in_file(path)[0].user_attrs["note"] == "look at this"


def test_a_full_disk_ends_in_a_reason_and_room_makes_it_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        with monkeypatch.context() as hurry:
            hurry.setattr(study_file, "CLOSING_PATIENCE", 1.0)
            search = SmallStudy(disk / "study.db")
            search.steps(20)
            assert search.study.close() is not None
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        close_and_compare(SmallStudy(disk / "study.db", earlier=search.recorded()))


def test_a_file_that_takes_long_to_read_is_not_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = closed(path, 150).recorded()
    read = RDBStorage._get_trials

    def slowly(*arguments: Any) -> list[FrozenTrial]:
        trials = read(*arguments)
        time.sleep(4 * len(trials) / len(earlier))
        return trials

    monkeypatch.setattr(RDBStorage, "_get_trials", slowly)
    monkeypatch.setattr(study_file, "_AT_ONCE", len(earlier) // 8)
    monkeypatch.setattr(study_file, "CLOSING_PATIENCE", 2.0)
    assert SmallStudy(path, earlier=earlier).study.close() is None


def search_without_end(path: Path) -> None:
    study_file.WRITE_EVERY = 0.001
    search = SmallStudy(path)
    while True:
        search.steps(1)
        time.sleep(0.002)


def test_killed_in_mid_write_the_file_is_brought_up_to_date(path: Path) -> None:
    writer = fork(search_without_end, path)
    wait_for(path, 20)
    writer.kill()
    writer.join()
    search = SmallStudy(path)  # the same steps, and more
    while len(search.study.trials()) < 40:
        search.steps(1)
    close_and_compare(search)
