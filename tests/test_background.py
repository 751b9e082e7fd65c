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

    def __init__(
        self, failures: int = 0, then: Callable[[], object] = lambda: None, **pace: Any
    ) -> None:
        self._failures, self._then = failures, then
        self.closing: list[bool] = []
        self.thread = BackgroundThread("rounds", replace(BRISK, **pace), self._do, str)

    def _do(self, closing: bool) -> None:
        self.closing.append(closing)
        if len(self.closing) <= self._failures:
            raise OSError(f"failure {len(self.closing)}")
        self._then()


class Pauses(threading.Event):
    """An event whose waits return at once, and which is set after so many."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number
        self.lengths: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.lengths.append(timeout)
        self._left -= 1
        return self._left < 0


def pauses(rounds: Rounds, number: int) -> list[float | None]:
    """Return how long a thread pauses before each of so many rounds, and before its last."""
    rounds.thread._closing = found = Pauses(number)
    rounds.thread.start()
    rounds.thread.join(PATIENCE)
    return found.lengths


def test_a_close_as_the_thread_wakes_is_not_missed() -> None:
    class SetWhileWaking(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            was_set = super().wait(timeout)
            self.set()  # between the end of a wait in vain and the waiter's next step
            return was_set

    rounds = Rounds()
    rounds.thread._closing = SetWhileWaking()
    rounds.thread.start()
    rounds.thread.join(PATIENCE)
    assert rounds.closing == [False, True]


def test_after_failures_the_pauses_double_up_to_a_limit_and_a_success_resets_them() -> None:
    rounds = Rounds(failures=4, every=2.0, retry_after=0.5, pause_at_most=5.0)
    assert pauses(rounds, 6) == [2.0, 2.5, 3.0, 4.0, 5.0, 2.0, 2.0]


def test_rounds_that_take_long_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [0.0], iter([0.1, 1.0, 10.0, 0.0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def work() -> None:
        now[0] += next(took)

    rounds = Rounds(then=work, every=2.0, pause_at_most=15.0, load=0.2)
    assert pauses(rounds, 3) == [2.0, 2.0, 4.0, 15.0]


@pytest.mark.parametrize(("retries", "rounds_done"), [(True, 4), (False, 1)])
def test_at_the_end_a_failed_round_is_repeated_until_it_succeeds_or_not_at_all(
    retries: bool, rounds_done: int
) -> None:
    rounds = Rounds(failures=3, every=PATIENCE, retries_at_end=retries)
    rounds.thread.start()
    assert rounds.thread.close() == (None if retries else "failure 1")
    assert rounds.closing == [True] * rounds_done


def test_one_that_hangs_or_fails_to_the_end_is_given_up_with_a_reason() -> None:
    release = threading.Event()
    hanging = Rounds(then=lambda: release.wait(PATIENCE), patience=0.05).thread
    rounds = Rounds(failures=10**9, patience=0.05)
    failing = rounds.thread
    for thread in (hanging, failing):
        thread.start()
    while len(rounds.closing) < 2:  # so it has said why the first one failed
        time.sleep(0.001)
    assert hanging.close() == "no answer within 0.05 s"
    for _ in range(2):
        assert str(failing.close()).startswith("failure ")
    release.set()
    for thread in (hanging, failing):
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_closing_waits_as_long_as_there_is_progress() -> None:
    steps = threading.Semaphore(0)

    class Stepping(BackgroundThread):
        """Lets the round make one step each time that somebody has lost patience."""

        def join(self, timeout: float | None = None) -> None:
            before = self._steps
            steps.release()
            while self._steps == before and self.is_alive():
                super().join(0.001)

    def work(closing: bool) -> None:
        for _ in range(3):
            assert steps.acquire(timeout=PATIENCE)
            thread.made_progress()

    thread = Stepping("stepping", BRISK, work, str)
    thread.start()
    assert thread.close() is None
    assert not thread.given_up
