"""Where the copy of a run lies, and which of several drivers may write there."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tune_mnist.errors import ConfigError, RunFolderError
from tune_mnist.locations import storage_uri
from tune_mnist.tuning import remote as module
from tune_mnist.tuning.remote import Lease, RemoteRun, StoppedError
from tune_mnist.tuning.sync import folder_for

TAKES = 0.1  # seconds, a lease


def test_a_folder_may_be_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_uri("my runs") == f"file://{tmp_path}/my%20runs"
    assert RemoteRun.within(storage_uri("my runs"), "a?").name == "a?"
    assert RemoteRun.within("s3://b/runs?region=x", "a").uri == "s3://b/runs/a?region=x"
    assert RemoteRun.within("s3://b/runs?region=x", "a").storage == "s3://b/runs?region=x"


@pytest.mark.parametrize("path", ["a%2Fb", "..%2Fa", "..", "a%00b", "n" * 300])
def test_a_copy_whose_name_leads_elsewhere_is_not_resumed(tmp_path: Path, path: str) -> None:
    with pytest.raises(ConfigError, match="the last part of --resume must be"):
        folder_for(RemoteRun(f"file:///runs/{path}"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteRun:
    """An empty copy of `tmp_path / "run"`, whose drivers are impatient."""
    for name, seconds in (("LEASE", TAKES), ("SIGN_EVERY", 0.0), ("LOOK_EVERY", 0.02)):
        monkeypatch.setattr(module, name, seconds)
    (tmp_path / "run").mkdir()
    copy = RemoteRun((tmp_path / "there").as_uri())
    copy.make()
    return copy


UNREADABLE = [bytes(40), b"[1]", b"{}", b'"x"', b"", b'{"lease"', b"\xff", b"[" * 100_000]


@pytest.mark.parametrize(
    ("content", "dated"),
    [*((content, 0.0) for content in UNREADABLE), (b"x", 86_400.0), (b"x", -1e9)],
    ids=lambda given: str(given)[:9],
)
def test_a_sign_that_cannot_be_read_is_waited_for_and_then_replaced(
    copy: RemoteRun, tmp_path: Path, content: bytes, dated: float
) -> None:
    copy.write(".driver", content)
    when = time.time() + dated
    os.utime(tmp_path / "there" / ".driver", (when, when))
    lease = Lease(copy, tmp_path / "run")
    lease.take()  # within a minute, and not a day
    copy.write(".driver", content)
    assert not lease.keep()
    assert lease.keep()


@pytest.mark.parametrize("name", ["lease", "claim"])
def test_only_another_drivers_lease_is_a_takeover(
    copy: RemoteRun, tmp_path: Path, name: str
) -> None:
    lease = Lease(copy, tmp_path / "run")
    lease.take()
    assert lease.keep()
    (tmp_path / "there" / ".driver").unlink()
    assert not lease.keep()
    copy.write(".driver", json.dumps({"host": "other", "folder": "/run", name: "x"}).encode())
    with pytest.raises(StoppedError, match="is left to another driver"):
        lease.keep()
    lease.release()
    assert copy.read(".driver")


def test_a_sign_is_given_when_the_clock_is_set_back(
    copy: RemoteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIGN_EVERY", 0.01)
    lease = Lease(copy, tmp_path / "run")
    lease.take()
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: an_hour_ago)
    before = copy.read(".driver")
    time.sleep(0.02)
    assert lease.keep()
    assert copy.read(".driver") != before


def test_a_storage_that_is_away_is_no_takeover_and_is_not_made_anew(
    copy: RemoteRun, tmp_path: Path
) -> None:
    lease = Lease(copy, tmp_path / "run")
    lease.take()
    (tmp_path / "there").rename(tmp_path / "away")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            lease.keep()
    assert not (tmp_path / "there").exists()
    (tmp_path / "away").rename(tmp_path / "there")
    assert lease.keep()


def moved(run: Path, patch: pytest.MonkeyPatch) -> Path:
    return run.rename(run.with_name("moved"))


def cloned(run: Path, patch: pytest.MonkeyPatch) -> Path:
    return Path(shutil.copytree(run, run.with_name("clone")))


def on_another_machine(run: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(module, "_machine", lambda: "another")
    return run


@pytest.mark.parametrize(
    ("change", "waits"),
    [(lambda run, _: run, False), (moved, False), (cloned, True), (on_another_machine, True)],
)
@pytest.mark.parametrize("lives", [False, True])
def test_a_dead_drivers_lease_is_known_by_machine_and_folder(
    copy: RemoteRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], Path],
    waits: bool,
    lives: bool,
) -> None:
    first = Lease(copy, tmp_path / "run")
    first.take()
    second, looks = Lease(copy, change(tmp_path / "run", monkeypatch)), []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if lives:
            first.keep()

    monkeypatch.setattr(time, "sleep", look)
    if lives and waits:
        with pytest.raises(RunFolderError, match="is in use: a search on"):
            second.take()
    else:
        second.take()
        assert bool(looks) == waits
