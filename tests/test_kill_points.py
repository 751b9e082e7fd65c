"""A search is killed at every change that it makes to the disk, and resumed from what is left.

A `kill -9` strikes between two changes or in the middle of one. So a whole search runs once while
its folder is copied before each change and halfway through it, and the search is resumed from
every copy. Each must end as the search that nobody killed.
"""

import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.course import Course
from support.scripted import curve

from tune_mnist.runs.history import History, TrialRecord
from tune_mnist.tuning.study_file import facts

TRIALS, EPOCHS, RETRIES = 9, 4, 1
DYING = {1: (2, 1), 3: (2, 2)}  # trial: its worker dies in this epoch, so many times
DIVERGING = {2: 2}  # trial: the epoch in which it does
Files = dict[str, bytes]


def opened(folder: Path) -> Course:
    return Course(folder, trials=TRIALS, epochs=EPOCHS, grace_epochs=2, startup_trials=4)


def run(course: Course) -> None:
    course.history.close()
    with course.folder.only_writer(), closing(course.history):
        while course.experiment.has_next:
            assignment = course.experiment.next_trial("ray")
            record = course.history.trials[assignment.number]
            assert assignment.state == (f"after {record.epochs}".encode() if record.rows else None)
            run_trial(course, record)
        course.experiment.close("finished")


def run_trial(course: Course, record: TrialRecord) -> None:
    number, stop = record.number, False
    while not stop:
        epoch = record.epochs + 1
        last, deaths = DYING.get(number, (0, 0))
        if epoch == last and record.retries == RETRIES < deaths:
            course.experiment.fail(number, "the worker died again")
            return
        if epoch == last and record.retries < deaths:
            course.experiment.retry(number, "the worker died")
            return
        diverges = DIVERGING.get(number) == epoch
        stop = course.epoch(number, math.nan if diverges else curve(record.config, epoch))
    course.experiment.finish(number)


def outcome(course: Course) -> str:
    history = History.load(course.folder)
    trials = [vars(record) for record in history.trials.values()]
    times = ("started_at", "ended_at")
    recorded = [{name: trial[name] for name in trial if name not in times} for trial in trials]
    proposed = [facts(trial) for trial in course.study.trials()]
    order = [(record.number, row.epoch) for record, row in history.rows]
    files = contents(course.path)
    # As text: NaN is not equal to itself.
    return repr((recorded, proposed, order, sorted(files), files["best.pt"]))


def contents(folder: Path) -> Files:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def restore(files: Files, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def noticing(notice: Callable[[], None], torn_everywhere: bytes = b"\0") -> Iterator[None]:
    """Call `notice` before each change to the disk and halfway through it.

    A line is torn after its first byte, in the middle and before its end; one that begins with
    `torn_everywhere` after every byte.
    """

    def write(file: int, line: bytes) -> int:
        size = os.fstat(file).st_size
        some = (0, 1, len(line) // 2, len(line) - 1)
        for length in range(len(line)) if line.startswith(torn_everywhere) else some:
            unpatched["write"](file, line[:length])
            notice()
            os.truncate(file, size)
        written: int = unpatched["write"](file, line)
        return written

    def replace(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            content = source.read_bytes()
            source.write_bytes(content[: len(content) // 2])
            notice()
            source.write_bytes(content)
        notice()
        unpatched["replace"](source, target)

    def unlink(path: Path) -> None:
        notice()
        unpatched["unlink"](path)

    changes = {"write": write, "replace": replace, "unlink": unlink}
    unpatched: dict[str, Any] = {name: getattr(os, name) for name in changes}
    with pytest.MonkeyPatch.context() as patch:
        for name, change in changes.items():
            patch.setattr(os, name, change)
        yield


@contextmanager
def kill_points(folder: Path, torn_everywhere: bytes = b"\0") -> Iterator[list[Files]]:
    found: list[Files] = []

    def keep() -> None:
        files = contents(folder)
        if not found or found[-1] != files:
            found.append(files)

    with noticing(keep, torn_everywhere):
        yield found
        keep()


@pytest.fixture(autouse=True, scope="module")
def fast_disk() -> Iterator[None]:
    """A kill takes nothing that the operating system has, so nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def unbroken(fast_disk: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Files], str]:
    """All that a kill could leave of a search, and what it comes to if nobody kills it."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with kill_points(folder, torn_everywhere=b"1,1,") as found:  # the first row of trial 1
        course = opened(folder)
        run(course)
    states = [record.state for record in course.history.trials.values()]
    assert {*states} == {"complete", "stopped", "diverged", "failed"}
    assert len(found) > 300
    return found, outcome(course)


def resumed(folder: Path) -> str:
    """Resume what lies in a folder and return what it comes to."""
    course = opened(folder)
    run(course)
    return outcome(course)


SOME_OR_ALL = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])


@SOME_OR_ALL
def test_a_search_killed_at_any_change_and_again_as_it_resumes_ends_as_the_unbroken_one(
    unbroken: tuple[list[Files], str], tmp_path: Path, every: int
) -> None:
    repaired, (points, expected) = 0, unbroken
    for number in range(0, len(points), every):
        assert resumed(restore(points[number], tmp_path / "run")) == expected
        if number % 21 == 0:
            with kill_points(restore(points[number], tmp_path / "run")) as found:
                opened(tmp_path / "run")
            repaired += len(found) > 5  # more than the session's own event was written
            for again in found[::every]:
                assert resumed(restore(again, tmp_path / "run")) == expected
    assert repaired > 3


def exit_at(moment: int) -> Callable[[], None]:
    """Return what leaves the process, as a second signal has it do, at this call."""
    calls = itertools.count(1)

    def notice() -> None:
        if next(calls) == moment:
            raise SystemExit(143)

    return notice


@SOME_OR_ALL
def test_a_search_that_a_second_signal_ends_at_any_change_ends_as_the_unbroken_one(
    unbroken: tuple[list[Files], str], tmp_path: Path, every: int
) -> None:
    """Other than a kill, an exception has files closed and cleared up."""
    for moment in itertools.count(1, 3 * every):
        folder = restore({}, tmp_path / "run")
        try:
            with noticing(exit_at(moment)):
                run(opened(folder))
        except SystemExit:
            assert resumed(folder) == unbroken[1]
        else:
            break
    assert moment > 200
