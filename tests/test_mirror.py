import contextlib
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from tune_mnist.tuning import study_file as mirror
from tune_mnist.tuning.study import SamplerSettings, Study
from tune_mnist.tuning.study_file import StudyFile, facts, is_sound

optuna.logging.set_verbosity(optuna.logging.ERROR)

HOLD = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(sys.argv[2])
connection.execute("SELECT count(*) FROM trials").fetchall()
print(flush=True)
time.sleep(float(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "WRITE_EVERY", 0.02)
    monkeypatch.setattr(mirror, "RETRY_AFTER", 0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


class Search:
    """A small search that reports made-up values, with several trials at once."""

    def __init__(self, path: Path, seed: int = 0, earlier: list[FrozenTrial] | None = None):
        self.study = Study(SamplerSettings(0, 5), "val_accuracy", StudyFile(path, "val_accuracy"))
        self.generator = random.Random(seed)
        self.live: list[int] = []
        for trial in earlier or []:
            self.study.add(trial)
            if not trial.state.is_finished():
                self.live.append(trial.number)

    @staticmethod
    def sample(trial: optuna.Trial) -> dict[str, Any]:
        trial.suggest_float("lr", 1e-3, 0.3, log=True)
        if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
            trial.suggest_categorical("nesterov", [False, True])
        trial.suggest_int("layers", 2, 10)
        return dict(trial.params)

    def start(self) -> int:
        number = len(self.study.trials())
        fixed = {"lr": 0.05} if number == 1 else {}
        self.study.ask(number, self.sample, fixed, {"ray_trial_id": f"ray{number}"})
        self.live.append(number)
        return number

    def report(self, number: int) -> None:
        epoch = len(self.study.trials()[number].intermediate_values) + 1
        self.study.report(number, epoch, self.generator.random())

    def end(self, number: int) -> None:
        self.live.remove(number)
        state = TrialState.FAIL
        if self.study.trials()[number].intermediate_values:
            state = self.generator.choice([TrialState.COMPLETE, TrialState.PRUNED])
        self.study.tell(number, state, {"state": state.name, "reason": "größer ☠"})

    def step(self) -> None:
        chance = self.generator.random()
        if len(self.live) < 2 or (chance < 0.2 and len(self.live) < 5):
            self.start()
        elif chance < 0.8:
            self.report(self.generator.choice(self.live))
        else:
            self.end(self.generator.choice(self.live))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def recorded(self) -> list[FrozenTrial]:
        """What a run's history would know of it."""
        trials = []
        for trial in self.study.trials():
            known = FrozenTrial(
                number=trial.number,
                state=TrialState.RUNNING if trial.state == TrialState.WAITING else trial.state,
                value=None,
                values=trial.values,
                datetime_start=trial.datetime_start,
                datetime_complete=trial.datetime_complete,
                params=dict(trial.params),
                distributions=dict(trial.distributions),
                user_attrs=dict(trial.user_attrs),
                system_attrs={},
                intermediate_values=dict(trial.intermediate_values),
                trial_id=0,
            )
            trials.append(known)
        return trials


def in_file(path: Path) -> list[FrozenTrial]:
    """The trials of the file, read as a user would."""
    with tempfile.TemporaryDirectory() as folder:  # one whose name any URL can hold
        copied = Path(shutil.copy(path, folder))
        study = optuna.load_study(study_name="tune_mnist", storage=f"sqlite:///{copied}")
        assert study.direction == optuna.study.StudyDirection.MAXIMIZE
        assert study.metric_names == ["val_accuracy"]
        return study.get_trials()


def assert_mirrors(path: Path, search: Search) -> None:
    found, expected = in_file(path), search.study.trials()
    assert [facts(trial) for trial in found] == [facts(trial) for trial in expected]
    assert [trial.number for trial in found] == [trial.number for trial in expected]
    assert TrialState.RUNNING not in {trial.state for trial in found}


def wait_for(path: Path, trials: int) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
            if db.execute("SELECT count(*) FROM trials").fetchone()[0] >= trials:
                return
        time.sleep(0.02)
    raise AssertionError("the mirror did not write")


@contextlib.contextmanager
def held(path: Path, how: str, seconds: float) -> Iterator[None]:
    """Have another process lock a SQLite file."""
    command = [sys.executable, "-c", HOLD, str(path), how, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            yield
        finally:
            holder.kill()


def spoil(path: Path, how: str) -> None:
    size = path.stat().st_size
    if how == "random":
        path.write_bytes(random.Random(0).randbytes(size))
    elif how == "middle":
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(random.Random(0).randbytes(size - 8192))
    elif how == "cut":
        with path.open("r+b") as file:
            file.truncate(size // 2)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_text("a text\n" * 1000)


@pytest.mark.parametrize("seed", range(3))
def test_the_file_says_what_the_study_in_memory_says(path: Path, seed: int) -> None:
    search = Search(path, seed)
    for _ in range(12):
        search.steps(10)
        time.sleep(0.03)
    assert search.study.close() is None
    assert_mirrors(path, search)
    assert sorted(p.name for p in path.parent.iterdir()) == ["study.db"]


def test_a_resumed_search_goes_on_in_the_same_file(path: Path) -> None:
    search = Search(path)
    inode = None
    for session in range(2):
        search.steps(30)
        assert search.study.close() is None
        assert_mirrors(path, search)
        inode = inode or path.stat().st_ino
        search = Search(path, session + 1, earlier=search.recorded())
    assert search.study.close() is None
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("name", ["größe, with space", "a?b=c#d%20{x}", "it's\"so\\"])
def test_any_folder_name_will_do(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    search = Search(folder / "study.db")
    search.steps(15)
    assert search.study.close() is None
    assert_mirrors(folder / "study.db", search)
    assert is_sound(folder / "study.db")
    spoil(folder / "study.db", "random")
    assert not is_sound(folder / "study.db")
    assert [path.name for path in tmp_path.rglob("*")] == [name, "study.db"]


def test_a_search_without_trials_leaves_an_empty_study(path: Path) -> None:
    search = Search(path)
    assert search.study.close() is None
    assert in_file(path) == []


def test_a_user_can_load_the_study_in_mid_search(path: Path) -> None:
    search = Search(path)
    search.steps(40)
    wait_for(path, len(search.study.trials()))
    study = optuna.load_study(study_name="tune_mnist", storage=f"sqlite:///{path}")
    assert len(study.trials) == len(search.study.trials())
    assert study.best_value > 0
    assert set(study.trials_dataframe()["state"]) >= {"RUNNING", "COMPLETE"}
    search.steps(40)
    assert search.study.close() is None
    assert_mirrors(path, search)


@pytest.mark.parametrize("how", ["BEGIN EXCLUSIVE", "BEGIN"])
def test_a_reader_who_locks_the_file_holds_nothing_up_and_loses_nothing(
    path: Path, how: str
) -> None:
    search = Search(path)
    search.steps(10)
    wait_for(path, 1)
    with held(path, how, 2.0):
        slowest = 0.0
        for _ in range(50):
            start = time.perf_counter()
            search.step()
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.01)
        assert slowest < 0.5
        before = len(search.study.trials())
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            if how == "BEGIN":
                assert db.execute("SELECT count(*) FROM trials").fetchone()[0] < before
        time.sleep(0.5)
    assert search.study.close() is None
    assert_mirrors(path, search)


def test_a_file_that_stays_locked_ends_in_a_reason_within_bounds(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CLOSING_PATIENCE", 2.5)
    monkeypatch.setattr(mirror, "LOCK_TIMEOUT", 0.1)
    search = Search(path)
    search.steps(30)
    wait_for(path, len(search.study.trials()))
    with held(path, "BEGIN EXCLUSIVE", 60):
        search.report(search.live[0])
        start = time.monotonic()
        assert search.study.close() == "database is locked"
        assert time.monotonic() - start < 4.5
        assert search.study.close() == "database is locked"
    resumed = Search(path, earlier=search.recorded())
    assert resumed.study.close() is None
    assert_mirrors(path, resumed)


def test_a_file_deleted_in_mid_search_is_made_anew(path: Path) -> None:
    search = Search(path)
    search.steps(30)
    wait_for(path, 5)
    path.unlink()
    search.steps(5)
    wait_for(path, 5)
    path.unlink()  # and once more, with nothing left to write
    assert search.study.close() is None
    assert_mirrors(path, search)


@pytest.mark.parametrize(
    ("when", "how"),
    [
        *(("in mid-search", "random"), ("in mid-search", "cut"), ("in mid-search", "empty")),
        *(("before a resume", "middle"), ("before a resume", "text")),
    ],
)
def test_a_spoilt_file_is_put_aside_and_made_anew(path: Path, when: str, how: str) -> None:
    search = Search(path)
    search.steps(60)
    if when == "in mid-search":
        wait_for(path, len(search.study.trials()))
        time.sleep(0.1)
        spoil(path, how)
        search.steps(10)
    else:
        assert search.study.close() is None
        spoil(path, how)
        spoilt = path.read_bytes()
        search = Search(path, 1, earlier=search.recorded())
    assert search.study.close() is None
    assert_mirrors(path, search)
    if when == "before a resume":
        assert path.with_name("study.db.damaged").read_bytes() == spoilt


def test_a_spoilt_files_journal_does_not_spoil_its_successor(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    path.with_name("study.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"x" * 99)
    search = Search(path)
    search.steps(20)
    assert search.study.close() is None
    assert_mirrors(path, search)
    assert path.with_name("study.db.damaged").exists()


def test_a_file_that_says_otherwise_of_a_finished_trial_is_put_aside(path: Path) -> None:
    search = Search(path, seed=1)
    search.steps(40)
    assert search.study.close() is None
    other = Search(path, seed=2)
    other.steps(40)
    assert other.study.close() is None
    assert_mirrors(path, other)
    assert [facts(trial) for trial in in_file(path.with_name("study.db.outdated"))] == [
        facts(trial) for trial in search.study.trials()
    ]


@pytest.mark.parametrize("change", ["params", "intermediate_values"])
def test_a_file_that_says_otherwise_of_a_running_trial_is_put_aside(
    path: Path, change: str
) -> None:
    search = Search(path)
    search.report(search.start())
    assert search.study.close() is None
    (trial,) = search.recorded()
    setattr(trial, change, {"params": {**trial.params, "lr": 0.123}}.get(change, {}))
    resumed = Search(path, earlier=[trial])
    assert resumed.study.close() is None
    assert_mirrors(path, resumed)
    assert path.with_name("study.db.outdated").exists()


def test_a_trial_that_only_the_file_knows_does_not_stay(path: Path) -> None:
    """As where the kill came before the trial's start was in the history."""
    search = Search(path)
    search.steps(30)
    search.start()
    earlier = search.recorded()[:-1]
    assert search.study.close() is None
    resumed = Search(path, earlier=earlier)
    assert resumed.study.close() is None
    assert_mirrors(path, resumed)


def test_a_trial_that_a_user_adds_to_the_file_goes_aside(path: Path) -> None:
    search = Search(path)
    search.steps(20)
    wait_for(path, len(search.study.trials()))
    optuna.load_study(study_name="tune_mnist", storage=f"sqlite:///{path}").ask()
    for _ in range(3):
        search.start()
    assert search.study.close() is None
    assert_mirrors(path, search)
    assert path.with_name("study.db.outdated").exists()


def test_what_a_user_notes_on_a_trial_stays(path: Path) -> None:
    search = Search(path)
    search.end(search.start())
    assert search.study.close() is None
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
            "VALUES (1, 'note', '\"look at this\"')"
        )
    resumed = Search(path, earlier=search.recorded())
    resumed.steps(5)
    assert resumed.study.close() is None
    assert in_file(path)[0].user_attrs["note"] == "look at this"


def test_tables_of_another_optuna_are_put_aside(path: Path) -> None:
    search = Search(path)
    search.steps(20)
    assert search.study.close() is None
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = 'v2.4.0.a'")
    resumed = Search(path, earlier=search.recorded())
    assert resumed.study.close() is None
    assert_mirrors(path, resumed)
    assert path.with_name("study.db.outdated").exists()


def test_a_full_disk_ends_in_a_reason_and_room_makes_it_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CLOSING_PATIENCE", 1.0)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        search = Search(disk / "study.db")
        search.steps(20)
        assert search.study.close() is not None
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        resumed = Search(disk / "study.db", earlier=search.recorded())
        monkeypatch.setattr(mirror, "CLOSING_PATIENCE", 20.0)
        assert resumed.study.close() is None
        assert_mirrors(disk / "study.db", resumed)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_folder_that_is_gone_ends_in_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "CLOSING_PATIENCE", 0.5)
    search = Search(tmp_path / "gone" / "study.db")
    search.steps(5)
    assert search.study.close() == "unable to open database file"


def test_two_searches_write_side_by_side(tmp_path: Path) -> None:
    searches: list[Search] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        searches.append(Search(tmp_path / name / "study.db", seed=len(searches)))
    for search in searches * 3:
        search.steps(15)
    for search, name in zip(searches, ("one", "two"), strict=True):
        assert search.study.close() is None
        assert_mirrors(tmp_path / name / "study.db", search)


def test_killed_in_mid_write_the_file_is_brought_in_line(path: Path) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_mirror
test_mirror.mirror.WRITE_EVERY = 0.001
search = test_mirror.Search(Path(sys.argv[1]))
for _ in range(10**6):
    search.steps(1)
    if len(search.study.trials()) == 20: print(flush=True)
    test_mirror.time.sleep(0.002)
"""
    command = [sys.executable, "-c", code, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        wait_for(path, 10)
        writer.kill()
    search = Search(path)  # the same steps, and more
    while len(search.study.trials()) < 60:
        search.step()
    assert search.study.close() is None
    assert_mirrors(path, search)


def test_no_thread_is_left(path: Path) -> None:
    search = Search(path)
    search.steps(5)
    assert search.study.close() is None
    assert "study.db" not in {thread.name for thread in threading.enumerate()}


def test_a_close_as_the_writer_wakes_is_not_missed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EventSetWhileWaking(threading.Event):
        """Set by another thread between the end of a wait in vain and the waiter's next step."""

        def wait(self, timeout: float | None = None) -> bool:
            was_set = super().wait(timeout)
            if not was_set:
                closer.start()
                started.set()
                time.sleep(0.1)
            return was_set

    monkeypatch.setattr(mirror, "WRITE_EVERY", 0.2)
    monkeypatch.setattr(mirror, "CLOSING_PATIENCE", 5.0)
    search = Search(path)
    started, reasons = threading.Event(), list[str | None]()
    closer = threading.Thread(target=lambda: reasons.append(search.study.close()))
    monkeypatch.setattr(search.study._mirror, "_closing", EventSetWhileWaking())
    search.steps(5)
    assert started.wait(20)
    closer.join(60)
    assert reasons == [None]
    assert_mirrors(path, search)
