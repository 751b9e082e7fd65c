"""The one thread beside the search: when it works, what it does about failures, how it ends."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tune_mnist.tuning.background import BackgroundThread, Pace

PATIENCE = 60.0  # seconds that anything may take
BRISK = Pace(every=0.01, retry_after=0.01, pause_at_most=0.1, patience=PATIENCE)


class Rounds:
    """Notes its rounds, of which the first ones fail; `then` is done in each of the others."""

    def __init__(self, failures: int = 0, then: Callable[[], object] = lambda: None) -> None:
        self._failures, self._then = failures, then
        self.closing: list[bool] = []
        self.errors: list[Exception] = []

    def thread(self, **changes: Any) -> BackgroundThread:
        return BackgroundThread("rounds", replace(BRISK, **changes), self._do, self._fail)

    def _do(self, closing: bool) -> None:
        self.closing.append(closing)
        if len(self.closing) <= self._failures:
            raise OSError(f"failure {len(self.closing)}")
        self._then()

    def _fail(self, error: Exception) -> str:
        self.errors.append(error)
        return str(error)


class Pauses(threading.Event):
    """An event whose waits return at once, and which is set after so many."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.lengths: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.lengths.append(timeout)
        return len(self.lengths) > self._number


def pauses(rounds: Rounds, number: int, **pace: float) -> list[float]:
    """Return how long a thread pauses before each of so many rounds, and before its last."""
    thread = rounds.thread(**pace)
    thread._closing = pauses = Pauses(number)
    thread.start()
    thread.join(PATIENCE)
    return pauses.lengths


def test_a_last_round_is_done_and_known_as_such() -> None:
    worked = threading.Event()
    rounds = Rounds(then=worked.set)
    thread = rounds.thread()
    thread.start()
    assert worked.wait(PATIENCE)
    assert thread.close() is None
    assert rounds.closing == [False] * (len(rounds.closing) - 1) + [True]
    assert not thread.is_alive()
    assert thread.daemon


def test_a_close_as_the_thread_wakes_is_not_missed() -> None:
    class SetWhileWaking(threading.Event):
        """Set between the end of a wait in vain and the waiter's next step."""

        def wait(self, timeout: float | None = None) -> bool:
            was_set = super().wait(timeout)
            self.set()
            return was_set

    rounds = Rounds()
    thread = rounds.thread()
    thread._closing = SetWhileWaking()
    thread.start()
    thread.join(PATIENCE)
    assert rounds.closing == [False, True]


def test_after_failures_the_pauses_double_up_to_a_limit_and_a_success_resets_them() -> None:
    pace = {"every": 2.0, "retry_after": 0.5, "pause_at_most": 5.0}
    rounds = Rounds(failures=4)
    assert pauses(rounds, 6, **pace) == [2.0, 2.5, 3.0, 4.0, 5.0, 2.0, 2.0]
    assert [str(error) for error in rounds.errors] == [f"failure {n}" for n in (1, 2, 3, 4)]


def test_rounds_that_take_long_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    took = iter([0.1, 1.0, 10.0, 0.0])

    def work() -> None:
        now[0] += next(took)

    found = pauses(Rounds(then=work), 3, every=2.0, pause_at_most=15.0, load=0.2)
    assert found == [2.0, 2.0, 4.0, 15.0]


def test_at_the_end_a_failed_round_is_repeated_until_it_succeeds() -> None:
    rounds = Rounds(failures=3)
    thread = rounds.thread(every=PATIENCE)
    thread.start()
    assert thread.close() is None
    assert rounds.closing == [True] * 4


def test_or_it_is_not_where_that_is_not_wanted() -> None:
    rounds = Rounds(failures=3)
    thread = rounds.thread(every=PATIENCE, retries_at_end=False)
    thread.start()
    assert thread.close() == "failure 1"
    assert rounds.closing == [True]


def test_one_that_hangs_or_fails_to_the_end_is_given_up_with_a_reason() -> None:
    release = threading.Event()
    hanging = Rounds(then=lambda: release.wait(PATIENCE)).thread(patience=0.05)
    failing = Rounds(failures=10**9).thread(patience=0.05)
    for thread in (hanging, failing):
        thread.start()
    try:
        assert hanging.close() == "no answer within 0.05 s"
        assert str(failing.close()).startswith("failure ")
        assert str(failing.close()).startswith("failure ")
    finally:
        release.set()
    for thread in (hanging, failing):
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_closing_waits_as_long_as_there_is_progress() -> None:
    steps = threading.Semaphore(0)

    class Stepping(BackgroundThread):
        """Lets the round make one step each time that somebody has lost patience."""

        def join(self, timeout: float | None = None) -> None:
            assert timeout == 1.0
            before = self._steps
            steps.release()
            while self._steps == before and self.is_alive():
                super().join(0.001)

    def work(closing: bool) -> None:
        for _ in range(3):
            assert steps.acquire(timeout=PATIENCE)
            thread.made_progress()

    thread = Stepping("stepping", replace(BRISK, patience=1.0), work, str)
    thread.start()
    assert thread.close() is None
    assert not thread.given_up
