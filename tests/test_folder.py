import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.disks import as_nobody, mounted
from support.processes import running

from tune_mnist.errors import RunFolderError
from tune_mnist.runs.files import AppendLog
from tune_mnist.runs.folder import RunFolder, check_new_run

HOLD = """
import subprocess, time
from tune_mnist.runs.folder import RunFolder
with RunFolder.open(Path(sys.argv[1])).only_writer():
    child = subprocess.Popen(["sleep", "60"])  # as Ray's processes may outlive a killed driver
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "results" / "run")
    folder.write_search({"asked": {"trials": 3}})
    return folder


def test_a_folder_is_made_with_those_above_it_and_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some results" / "größe ≤ 5 #1?%20"
    check_new_run(path)
    assert list(tmp_path.iterdir()) == []
    made = RunFolder.create(path)
    made.write_search({"name": "größe", "small": 1e-05, "none": None})
    opened = RunFolder.open(path)
    assert opened.path == made.path
    assert opened.name == "größe ≤ 5 #1?%20"
    assert opened.read_search() == {"name": "größe", "small": 1e-05, "none": None}
    assert opened.checkpoints.is_dir()
    monkeypatch.chdir(path)
    assert RunFolder.open(Path()).name == opened.name
    with opened.only_writer():
        pass


def test_a_folder_whose_search_was_killed_before_it_began_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.create(path).only_writer():
        pass
    (path / ".search.yaml.77.tmp").write_text("ask")
    with pytest.raises(RunFolderError, match="exists"):  # it may be another's, just made
        check_new_run(path)
    os.utime(path, (0, 0))
    check_new_run(path)
    again = RunFolder.create(path)
    with again.only_writer():
        again.write_search({"asked": {}})
    assert {found.name for found in path.iterdir()} == {".lock", "checkpoints", "search.yaml"}


def assert_refused(path: Path, words: str) -> None:
    for refuse in (check_new_run, RunFolder.create):
        with pytest.raises(RunFolderError, match=words):
            refuse(path)


def test_what_lies_in_the_way_is_refused_early_and_late(folder: RunFolder, tmp_path: Path) -> None:
    assert_refused(folder.path, f"{folder.path} exists .* --resume")
    others = RunFolder.create(tmp_path / "others")
    (others.checkpoints / "0.pt").touch()
    os.utime(others.path, (0, 0))
    assert_refused(others.path, "exists")
    (tmp_path / "link").symlink_to("nowhere")
    assert_refused(tmp_path / "link", "exists")
    for path in (folder.search / "run", folder.search / "deeper" / "run"):  # below a file
        assert_refused(path, r"cannot write to .*results.*--results-dir")
    assert_refused(tmp_path / ("x" * 300), "File name too long")


def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    for mode in (0o555, 0o000):
        results = tmp_path / f"results{mode}"
        results.mkdir(mode=mode)
        with as_nobody(results):
            assert_refused(results / "run", r"cannot write to .*Permission denied")
    with (
        as_nobody(results),
        pytest.raises(RunFolderError, match=r"cannot be read \(Permission denied"),
    ):
        RunFolder.open(results / "run")


@pytest.mark.root
def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        assert_refused(disk / "run", "Read-only file system")


def test_of_several_that_make_the_same_run_at_once_one_succeeds(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tune_mnist.runs.folder import RunFolder;"
        "input(); RunFolder.create(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "results" / "run")]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    errors = [racer.communicate()[1] for racer in racers]
    assert sorted(racer.returncode for racer in racers) == [0, 1, 1]
    assert sum("is never overwritten" in error for error in errors) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rum", "does not exist (did you mean 'run'?)"),
        ("empty", "it has no search.yaml"),
        ("file", "it is a file"),
    ],
)
def test_what_is_no_run_is_refused_with_a_reason(folder: RunFolder, name: str, words: str) -> None:
    results = folder.path.parent
    (results / "empty").mkdir()
    (results / "file").touch()
    with pytest.raises(RunFolderError, match="is no run's folder") as caught:
        RunFolder.open(results / name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2]", b"just words", b"a: [", b"\xff\xfe\x00", b"\x00" * 100, b"a: 2024-99-99",
     b"!!python/object/apply:os.system ['false']", b"[" * 5_000, b"a: b: c"],
)  # fmt: skip
def test_a_damaged_search_yaml_is_one_clear_line(folder: RunFolder, content: bytes) -> None:
    folder.search.write_bytes(content)
    with pytest.raises(RunFolderError) as caught:
        folder.read_search()
    assert str(folder.search) in str(caught.value)
    assert "\n" not in str(caught.value)


def _bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("where", ["report.html", "events.jsonl", "tensorboard/0/x", "deep/a/b"])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to(path.parents[3] / "mine"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
        os.mkfifo,
        _bind,
    ],
)
def test_a_folder_with_anything_but_plain_files_and_folders_is_refused(
    folder: RunFolder, make: Callable[[Path], None], where: str
) -> None:
    path = folder.path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    for refuse in (lambda: RunFolder.open(folder.path), lambda: folder.only_writer().__enter__()):
        with pytest.raises(RunFolderError, match=f"holds '{where}', which is neither"):
            refuse()
    path.unlink()
    RunFolder.open(folder.path)


def test_a_linked_folder_in_a_run_is_refused_and_a_link_to_a_run_is_not(
    folder: RunFolder, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    assert RunFolder.open(tmp_path / "link").name == "run"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".x.7.tmp").touch()
    folder.checkpoints.rmdir()
    folder.checkpoints.symlink_to(tmp_path / "mine")
    with pytest.raises(RunFolderError, match="holds 'checkpoints'"), folder.only_writer():
        pass
    assert (tmp_path / "mine" / ".x.7.tmp").exists()


def test_a_resume_makes_the_folder_of_states_that_archives_drop(folder: RunFolder) -> None:
    folder.checkpoints.rmdir()
    with folder.only_writer():
        assert folder.checkpoints.is_dir()


def test_a_writer_whose_lock_was_deleted_is_found_by_its_events(folder: RunFolder) -> None:
    with folder.only_writer():
        log = AppendLog(folder.events)
        log.append("{}")
        (folder.path / ".lock").unlink()
        other = RunFolder.open(folder.path)
        assert other.is_at_work
        with pytest.raises(RunFolderError, match="is in use"), other.only_writer():
            pass
        log.close()


def test_one_process_writes_at_a_time(folder: RunFolder) -> None:
    with folder.only_writer():
        for refused in (folder, RunFolder.open(folder.path)):
            with (
                pytest.raises(RunFolderError, match="is in use: another search is writing to it"),
                refused.only_writer(),
            ):
                pass
    with folder.only_writer():  # and no longer than it needs to
        pass


def test_a_killed_writer_holds_nothing_even_if_its_children_live_on(folder: RunFolder) -> None:
    with (
        running(HOLD, folder.path) as line,
        pytest.raises(RunFolderError, match="is in use"),
        folder.only_writer(),
    ):
        pass
    try:
        os.kill(int(line), 0)
        with folder.only_writer():
            pass
    finally:
        os.kill(int(line), signal.SIGKILL)


def test_a_new_writer_clears_up_what_a_killed_one_had_begun(folder: RunFolder) -> None:
    leftovers = [folder.path / ".best.pt.7.tmp", folder.checkpoints / ".00001.state.7.tmp"]
    kept = folder.checkpoints / "00001.state"
    for path in (*leftovers, kept):
        path.touch()
    with folder.only_writer():
        assert not any(path.exists() for path in leftovers)
        assert kept.exists()


def test_a_folder_that_cannot_be_locked_is_refused(folder: RunFolder) -> None:
    folder.path.chmod(0o555)
    with (
        as_nobody(folder.search),
        pytest.raises(RunFolderError, match="cannot write"),
        folder.only_writer(),
    ):
        pass
