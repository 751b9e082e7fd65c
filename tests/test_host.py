"""What a process finds where a machine lacks a home, room or a name for the user."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.processes import environment, python

from tune_mnist import host
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import default_data_dir

# Nobody knows this number, and it may not write what it does not own.
STRANGER = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
LOOK = """
import json, os, tempfile
from pathlib import Path
from tune_mnist import host
host.settle()
with host.scratch() as scratch:
    (scratch / "file").touch()
    found = {"scratch": str(scratch), "mode": os.stat(scratch.parent).st_mode & 0o777}
for name in ("HOME", "MPLCONFIGDIR"):
    found[name] = os.environ.get(name)
print(json.dumps(found | {"left": scratch.parent.exists(), "cache": str(host.cache_dir())}))
"""


def look(changes: Mapping[str, str | None], *prefix: str) -> dict[str, Any]:
    """What a process with these variables, None for one that is unset, makes of its machine."""
    path = Path(host.__file__).parents[1]
    variables = environment(**{"PYTHONPATH": path, "MPLCONFIGDIR": None, **changes})
    done = python("-c", LOOK, prefix=prefix, env=variables, umask=0)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def stranger() -> tuple[str, ...]:
    try:
        subprocess.run([*STRANGER, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here")
    return STRANGER


@pytest.mark.parametrize(
    "changes",
    [
        {"HOME": None},
        {"HOME": "/nonexistent"},
        {"HOME": "relative"},
        {"HOME": "{locked}"},
        {"HOME": "{locked}", "MPLCONFIGDIR": "{locked}"},
        {"XDG_CACHE_HOME": "{locked}/cache"},
        {"XDG_CACHE_HOME": "{file}"},
        {"TMPDIR": "{long}"},
        {"TMPDIR": "{letter}"},
        {"TMPDIR": "{space}"},
        {"TMPDIR": "relative"},
        {"TMPDIR": "{locked}"},
        {"TMPDIR": "/nonexistent"},
        {"TMPDIR": "{file}"},
        {"TMPDIR": "/proc", "HOME": None, "XDG_CACHE_HOME": "relative"},
    ],
)
def test_a_process_finds_a_home_a_cache_and_room_for_sockets(
    stranger: tuple[str, ...], changes: dict[str, str], tmp_path: Path
) -> None:
    folders = {"long": "x" * 90, "letter": "é", "space": "a b", "locked": "locked"}
    places = {name: tmp_path / folder for name, folder in folders.items()}
    for place in places.values():
        place.mkdir()
    places["file"] = tmp_path / "file"
    places["file"].touch()
    places["locked"].chmod(0o500)
    given = {name: value and value.format_map(places) for name, value in changes.items()}
    found = look(given, *stranger)
    assert len(found["scratch"]) <= host.SOCKET_PATH - host.BELOW_SCRATCH
    assert found["scratch"].isascii()
    assert found["mode"] == 0o700
    assert not found["left"]
    assert Path(found["cache"]).is_absolute()
    assert str(tmp_path) not in found["cache"]
    assert Path(found["HOME"]).is_dir()
    assert "locked" not in str(found["MPLCONFIGDIR"])


def test_where_nothing_is_amiss_all_stays_as_it_is(tmp_path: Path) -> None:
    changes = {"HOME": str(tmp_path), "TMPDIR": "/tmp", "XDG_CACHE_HOME": None}
    found = look({**changes, "XDG_CONFIG_HOME": None})
    assert (found["HOME"], found["MPLCONFIGDIR"]) == (str(tmp_path), None)
    assert found["cache"] == str(tmp_path / ".cache" / "tune_mnist")
    assert found["scratch"].startswith("/tmp/tm-")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_there_is_used_though_it_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert tmp_path not in host.cache_dir(holding="MNIST").parents
    (tmp_path / "tune_mnist" / "MNIST").mkdir(parents=True)
    assert host.cache_dir(holding="MNIST") == tmp_path / "tune_mnist"


@pytest.mark.parametrize("kind", ["open", "link"])
def test_a_folder_that_others_may_have_made_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(host, "temporary_folders", lambda: [tmp_path])
    guessed = tmp_path / f"tune_mnist-{os.geteuid()}"
    if kind == "open":
        guessed.mkdir()
        guessed.chmod(0o777)
    else:
        guessed.symlink_to(tmp_path)
    with pytest.raises(TuneMnistError, match="no folder for caches"):
        host.cache_dir()


def test_a_machine_without_room_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "temporary_folders", lambda: [Path("/none"), Path("/dev/shm")])
    monkeypatch.setattr(host, "LEAST_FREE", 2**63)
    with pytest.raises(TuneMnistError, match=r"none \(No such file.*shm \(full\).*TMPDIR") as told:
        host.scratch().__enter__()
    assert "\n" not in str(told.value)


def test_what_cannot_be_removed_yet_or_was_left_by_a_kill_is_removed_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with host.scratch() as alive:
        with monkeypatch.context() as busy:
            busy.setattr(host, "REMOVAL", 0.0)
            busy.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if a worker still wrote
            with host.scratch() as left:
                pass
        assert left.exists()
        with host.scratch():
            assert not left.parent.exists()
            assert alive.exists()


@pytest.mark.slow
def test_a_stranger_without_a_home_searches_with_a_read_only_installation(
    stranger: tuple[str, ...], tmp_path: Path
) -> None:
    package, site = Path(host.__file__).parent, tmp_path / "site"
    for folder in (package, package.parent / "search_spaces"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, site / folder.name, ignore=ignored)
    for folder in (site, *site.rglob("*")):
        folder.chmod(0o500)
    places = {"PYTHONPATH": site, "TMPDIR": tmp_path, "TUNE_MNIST_DATA": default_data_dir()}
    unset = dict.fromkeys(("HOME", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME"))
    variables = environment(**places, **unset)
    options = "--space sgd --trials 1 --epochs 1 --images 500 --results-dir . --run run"
    command = ("-m", "tune_mnist.search", *options.split())
    done = python(*command, prefix=stranger, cwd=tmp_path, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "report.html").exists()
    assert list(tmp_path.glob("tune_mnist-54321/.cache/numba/**/*.nbc"))
    assert not (tmp_path / "~").exists()
