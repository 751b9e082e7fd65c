import threading
from pathlib import Path

import pytest
from support.recorded import RecordedSearch

from tune_mnist.runs.history import EpochRow, TrialRecord
from tune_mnist.tuning import trackers as tracking
from tune_mnist.tuning.trackers import Tracking

PATIENCE = 60.0  # seconds that anything may take


class Notebook:
    """A tracker that writes down what it is told, and fails when it is told to."""

    def __init__(self, notes: list[str], there: int = 0, fails_at: str = "") -> None:
        self._notes, self._there, self._fails_at = notes, there, fails_at

    def begin(self, record: TrialRecord) -> int:
        self._note(f"begin {record.number}")
        return self._there

    def add_epoch(self, record: TrialRecord, row: EpochRow) -> None:
        self._note(f"epoch {record.number}.{row.epoch}")

    def end(self, record: TrialRecord) -> None:
        self._note(f"end {record.number} {record.state}")

    def flush(self) -> None:
        self._note("flush")

    def close(self) -> None:
        self._note("close")

    def _note(self, what: str) -> None:
        if what == self._fails_at:
            raise OSError(28, "No space left on device")
        self._notes.append(what)


@pytest.fixture
def search(tmp_path: Path) -> RecordedSearch:
    """One trial that ended, and one that has not."""
    search = RecordedSearch(tmp_path)
    search.trial([0.9, 0.95], state="stopped")
    search.epoch(search.start(lr=0.02), 0.8)
    return search


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOLLOW_EVERY", "RETRY_AFTER", "RETRY_AFTER_AT_MOST"):
        monkeypatch.setattr(tracking, name, 0.01)


def test_a_tracker_is_told_what_happened_and_what_happens_from_then_on(
    search: RecordedSearch,
) -> None:
    notes: list[str] = []
    began = threading.Event()

    class Awaited(Notebook):
        def flush(self) -> None:
            began.set()

    following = Tracking("X", search.history, lambda: Awaited(notes))
    assert began.wait(PATIENCE)
    assert notes == [
        *("begin 0", "epoch 0.1", "epoch 0.2", "end 0 stopped", "begin 1", "epoch 1.1"),
    ]
    search.epoch(1, 0.9)
    search.end(1, "complete")
    search.start(lr=0.03)
    assert following.close() is None
    assert notes[6:] == ["epoch 1.2", "end 1 complete", "begin 2", "close"]


def test_epochs_that_are_there_already_are_not_told_again(search: RecordedSearch) -> None:
    notes: list[str] = []
    assert Tracking("X", search.history, lambda: Notebook(notes, there=1)).close() is None
    assert [note for note in notes if "epoch" in note] == ["epoch 0.2"]


@pytest.mark.parametrize("fails_at", ["begin 0", "epoch 0.2", "end 0 stopped", "flush"])
def test_after_a_failure_another_tracker_is_told_everything(
    search: RecordedSearch, fails_at: str
) -> None:
    first: list[str] = []
    second: list[str] = []
    trackers = iter([Notebook(first, fails_at=fails_at), Notebook(second)])
    following = Tracking("X", search.history, lambda: next(trackers))
    deadline = threading.Event()
    while "flush" not in second and not deadline.wait(0.01):
        pass
    assert following.close() is None
    assert first[-1] == "close"
    assert [note for note in second if note != "flush"] == [
        *("begin 0", "epoch 0.1", "epoch 0.2", "end 0 stopped", "begin 1", "epoch 1.1", "close"),
    ]


def test_one_that_fails_to_the_end_is_a_warning(search: RecordedSearch) -> None:
    following = Tracking("X", search.history, lambda: Notebook([], fails_at="flush"))
    assert following.close() == (
        "X has not got everything (OSError: [Errno 28] No space left on device); epochs.csv has"
    )


def test_one_that_hangs_does_not_keep_the_search_from_ending(
    search: RecordedSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSING_PATIENCE", 0.2)
    free = threading.Event()

    def hang() -> Notebook:
        free.wait(PATIENCE)
        return Notebook([])

    following = Tracking("X", search.history, hang)
    try:
        assert following.close() == (
            "X has not got everything (it takes longer than 0.2 s); epochs.csv has"
        )
    finally:
        free.set()
