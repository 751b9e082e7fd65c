import math
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from support.disks import mounted
from support.processes import running

from tune_mnist.errors import RunFolderError, SearchFailedError
from tune_mnist.mnist.config import TrainConfig, parse_yaml
from tune_mnist.runs.files import (
    AppendLog,
    Count,
    Seconds,
    is_locked,
    read_plain,
    record_of,
    remove_leftovers,
    replace_file,
    write_output,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=64k") as path:
        yield path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_replaced_file_has_the_new_content_and_can_keep_the_old(tmp_path: Path) -> None:
    path, before = tmp_path / "a file.csv", tmp_path / "before"
    replace_file(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    replace_file(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert names(tmp_path) == ["a file.csv"]
    for content in ("two", "three"):
        replace_file(path, content, keep_as=before)
    assert (path.read_text(), before.read_text()) == ("three", "two")


def test_a_new_file_has_the_rights_that_any_new_file_has(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", "")
        log = AppendLog(tmp_path / "log")
        log.append("line")
        log.close()
    finally:
        os.umask(umask)
    for path in (tmp_path / "file", tmp_path / "log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_only_what_a_user_named_is_written_where_a_link_leads(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to("target")
    write_output(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    null = Path("/dev/null")
    write_output(null, "nothing")
    assert stat.S_ISCHR(null.stat().st_mode)
    tmp_path.joinpath(f".link.{os.getpid()}.tmp").symlink_to("target")  # laid there for us
    replace_file(link, "in its place")
    assert not link.is_symlink()
    assert (link.read_text(), target.read_text()) == ("in its place", "new")
    (tmp_path / "folder").mkdir()
    for write in (write_output, replace_file):
        with pytest.raises(IsADirectoryError):
            write(tmp_path / "folder", "content")
    assert names(tmp_path) == ["folder", "link", "target"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("file")])
def test_what_is_no_plain_file_is_neither_read_nor_appended_to(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    (tmp_path / "file").touch()
    make(tmp_path / "log")
    with pytest.raises(OSError, match=r"not a plain file|symbolic links"):
        read_plain(tmp_path / "log")
    with pytest.raises(OSError, match=r"not a plain file|symbolic links|directory"):
        AppendLog(tmp_path / "log").append("line")
    assert (tmp_path / "file").read_text() == ""


def test_more_than_a_file_can_have_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("12345")
    assert read_plain(tmp_path / "file", at_most=5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_plain(tmp_path / "file", at_most=4)


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    log, other = AppendLog(tmp_path / "log"), AppendLog(tmp_path / "log")
    log.append("one")
    assert is_locked(log.path)
    with pytest.raises(RunFolderError, match="is in use"):
        other.append("two")
    log.close()
    assert not is_locked(log.path)
    other.append("two")
    assert log.read() == [b"one", b"two"]


@pytest.mark.parametrize("open_before", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes() + b"another's\n"),
        lambda path: path.write_bytes(b""),
        lambda path: path.rename(path.with_name("elsewhere")),
        lambda path: replace_file(path, "another one's\n"),
    ],
)
def test_a_log_that_another_has_changed_is_not_appended_to(
    tmp_path: Path, spoil: Callable[[Path], object], open_before: bool
) -> None:
    log = AppendLog(tmp_path / "log")
    log.append("one")
    if not open_before:
        log.close()
    spoil(log.path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SearchFailedError, match="is not as this search left it"):
        log.append("two")
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.stat().st_size}
    assert after.items() <= before.items()


@dataclass(frozen=True)
class Sample:
    """A record with a field of every kind."""

    whole: Count
    number: Seconds = 0.0
    either: Count | None = None
    word: Literal["a", "b"] = "a"
    text: str = ""
    several: tuple[Count, ...] = ()
    inner: "Sample | None" = None
    config: TrainConfig | None = None
    truth: bool = False


def test_a_record_is_made_of_values_that_fit() -> None:
    values = {"whole": 3, "number": 2, "several": [1, 2], "inner": {"whole": 1}, "newer": 7}
    record = record_of(Sample, values | {"config": {"lr": 0.5}, "either": None, "truth": True})
    assert record == Sample(
        3, 2.0, several=(1, 2), inner=Sample(1), config=TrainConfig(lr=0.5), truth=True
    )
    assert type(record.number) is float


ODD_COUNTS: tuple[Any, ...] = (True, 1.0, "1", None, -1, 10**10, 10**400, [])
ODD_TIMES: tuple[Any, ...] = (True, "1", math.nan, math.inf, 1e300, 10**400)
ODD_WORDS: tuple[Any, ...] = ("c", ["a"], None, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (3, "must be a mapping, but got 3"),
        ({}, "whole is missing"),
        *[({"whole": odd}, "whole ") for odd in ODD_COUNTS],
        *[({"number": odd}, "number ") for odd in ODD_TIMES],
        *[({"word": odd}, "word cannot be") for odd in ODD_WORDS],
        *[({"text": odd}, "text cannot be") for odd in (1, None, "x" * 10**6)],
        ({"several": 1}, "several must be a list"),
        ({"several": [1, "a"]}, r"several\[1\] cannot be 'a'"),
        ({"inner": {"whole": -1}}, "inner.whole must be >= 0"),
        ({"config": []}, "config must be a mapping"),
        ({"config": {"lr": "high"}}, "lr: must be a number"),
        ({"truth": 1}, "truth cannot be 1"),
    ],
)
def test_a_value_that_does_not_fit_is_named(values: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        record_of(Sample, {"whole": 1, **values} if values and values != 3 else values)
    assert len(str(caught.value)) < 400


BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))


@pytest.mark.parametrize(
    "content", ["&a [*a]", "a: &a {b: *a}", f"a0: &a0 x\n{BOMB}", "&a {<<: *a}"]
)
def test_yaml_that_would_grow_without_bounds_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match="refers to itself, or too often"):
        parse_yaml(content.encode())
    assert parse_yaml(b"a: &a [1]\nb: *a") == {"a": [1], "b": [1]}


@pytest.mark.root
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(small_disk: Path) -> None:
    path, before = small_disk / "file", small_disk / "before"
    replace_file(path, "old", keep_as=before)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"x" * 100_000, keep_as=before)
    assert path.read_text() == "old"
    assert names(small_disk) == ["file"]


def test_readers_of_a_file_that_is_replaced_all_the_time_see_whole_contents(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    code = """
from tune_mnist.runs.files import replace_file
for number in range(10**9):
    replace_file(Path(sys.argv[1]), f"{number % 10}" * 300_000, sync=False)
    if not number: print(flush=True)
"""
    with running(code, path):
        seen = [path.read_text() for _ in range(200)]
    assert {len(content) for content in seen} == {300_000}
    assert all(len(set(content)) == 1 for content in seen)
    assert len({content[0] for content in seen}) > 1
    assert len(set(path.read_text())) == 1  # as the killed writer left it
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["file"]


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = [".lock", "best.pt", "file.tmp", ".tmp.x"]
    for name in (*kept, ".best.pt.123.tmp", ".00012.state.4.tmp"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_a_log_holds_its_lines_across_sessions(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    assert log.read() == []
    log.append("one")
    log.append("zwölf")
    log.sync()
    assert log.read() == [b"one", "zwölf".encode()]
    log.close()
    log.close()
    log.append("three")
    assert AppendLog(log.path).read() == [b"one", "zwölf".encode(), b"three"]


@pytest.mark.parametrize("finished", [b"", b"one\n"])
@pytest.mark.parametrize("rest", [b"o", b"\x00" * 4096, b"\xff\xfe"])
def test_an_unfinished_line_is_ignored_by_readers_and_cut_by_the_next_writer(
    tmp_path: Path, finished: bytes, rest: bytes
) -> None:
    path = tmp_path / "log"
    path.write_bytes(finished + rest)
    log = AppendLog(path)
    assert log.read() == finished.splitlines()
    assert path.read_bytes() == finished + rest  # its writer may be alive and about to finish it
    log.append("two")
    assert path.read_bytes() == finished + b"two\n"


@pytest.mark.root
def test_a_line_that_does_not_fit_leaves_the_log_as_it_was_and_room_makes_it_fit(
    small_disk: Path,
) -> None:
    ballast = small_disk / "ballast"
    log = AppendLog(small_disk / "log")
    log.append("one")
    ballast.write_bytes(b"x" * 50_000)
    with pytest.raises(OSError, match="No space left"):
        log.append("x" * 60_000)  # a part of it fits
    assert log.path.read_bytes() == b"one\n"
    ballast.unlink()
    log.append("two")
    assert log.path.read_bytes() == b"one\ntwo\n"


def test_a_line_past_the_limit_of_file_sizes_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    log.append("one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.append("x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == b"one\n"


def test_a_killed_writer_loses_no_line_that_it_had_appended(tmp_path: Path) -> None:
    path, told = tmp_path / "log", tmp_path / "told"
    code = """
import os
from tune_mnist.runs.files import AppendLog
log, told = AppendLog(Path(sys.argv[1])), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
for number in range(10**9):
    log.append(f"{number} " + "x" * 500)
    os.pwrite(told, b"%d" % number, 0)
    if not number: print(flush=True)
"""
    with running(code, path, told):
        time.sleep(0.05)  # for some lines more
    lines = AppendLog(path).read()
    assert int(told.read_text()) < len(lines) <= int(told.read_text()) + 2
    assert [int(line.split()[0]) for line in lines] == list(range(len(lines)))


def test_appending_costs_the_same_however_long_the_log_is(tmp_path: Path) -> None:
    log = AppendLog(tmp_path / "log")
    log.path.write_bytes((b"x" * 99 + b"\n") * 500_000)  # 50 MB
    log.append("opened")
    start = time.process_time()
    for _ in range(1000):
        log.append("y" * 100)
    assert time.process_time() - start < 1.0  # reading it every time takes many seconds
