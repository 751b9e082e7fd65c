import time
from pathlib import Path
from typing import Any

import pytest
from support.recorded import RecordedSearch, tally_of

from tune_mnist.runs.history import TrialRecord
from tune_mnist.tuning.live_view import Tally


@pytest.fixture
def search(tmp_path: Path) -> RecordedSearch:
    return RecordedSearch(tmp_path)


def _tally(search: RecordedSearch, **rules: Any) -> Tally:
    return tally_of(search, search.clock, **{"trials": 12, **rules})


def _end(search: RecordedSearch, tally: Tally, epochs: int) -> None:
    tally.end(search.trial([0.9] * epochs))


def test_trials_are_counted_from_start_to_end_and_the_baselines_best_is_kept(
    search: RecordedSearch,
) -> None:
    tally = _tally(search)
    first, second = search.start(), search.start(lr=0.5)
    assert [each.number for each in tally.running] == [first, second]
    assert tally.differences(tally.running[second]) == "lr 0.5"
    for loss in (0.3, 0.1, 0.2):
        search.epoch(first, 0.9, val_loss=loss)
    search.epoch(second, 0.95)
    search.end(first, "stopped")
    ended = tally.end(first)
    assert ended is search.history.trials[first]
    assert (tally.done, tally.epochs, len(tally.running)) == (1, 4, 1)
    assert tally.states == {"stopped": 1}
    assert tally.end(second) is None  # interrupted: a resume will continue it
    assert tally.done == 1
    assert tally.baseline.found is not None
    assert tally.baseline.found[1].epoch == 2


def test_a_resumed_search_counts_what_was_done(search: RecordedSearch) -> None:
    search.trial([0.9, 0.95])
    search.trial([0.5], state="failed", reason="RuntimeError")
    search.epoch(search.start(), 0.8)
    tally = _tally(search)
    assert (tally.done, tally.epochs) == (2, 4)
    assert tally.last_failure is search.history.trials[1]


def test_nothing_is_said_of_the_time_left_before_a_session_has_something_to_go_by(
    search: RecordedSearch,
) -> None:
    tally = _tally(search)
    for done in range(4):
        assert tally.time_left(search.clock) == "", f"after {done} of 12 trials"
        _end(search, tally, 4)
    assert tally.time_left(search.clock) != ""
    search.clock = 10_000.0  # the first session was slow
    tally = _tally(search)
    assert tally.time_left(10_000.0) == ""
    _end(search, tally, 4)
    assert tally.time_left(10_004.0) == "about 30 s left"


def test_a_trial_that_outlived_the_others_is_expected_to_train_to_the_end(
    search: RecordedSearch,
) -> None:
    tally = _tally(search, trials=5)
    for _ in range(4):
        _end(search, tally, 1)
    number = search.start()
    for _ in range(10):
        search.epoch(number, 0.9, seconds=59.5)
    assert tally.time_left(search.clock) == "about 10 min left"


def test_the_time_left_follows_from_the_pace_within_the_budget(search: RecordedSearch) -> None:
    tally = _tally(search, time_budget=600.0)
    assert tally.time_left(0.0) == "at most 10 min left"
    for _ in range(6):
        _end(search, tally, 4)  # 24 epochs
    # Six more trials of 4 epochs, at 10 s an epoch.
    assert tally.time_left(240.0) == "about 4 min left"
    assert tally.time_left(480.0) == "at most 2 min left"
    assert tally.time_left(700.0) == "at most 10 s left"


def test_a_look_costs_the_same_after_many_trials(search: RecordedSearch) -> None:
    search.trial([0.9] * 2)
    record = search.history.trials[0]
    for number in range(1, 5000):
        search.history.trials[number] = TrialRecord(
            number, record.config, 0, "sampled", state="complete", rows=record.rows
        )
        search.history.rows += [(search.history.trials[number], row) for row in record.rows]
    tally = _tally(search, trials=10_000)
    began = time.process_time()
    for _ in range(100):
        tally.time_left(1000.0)
    assert time.process_time() - began < 0.1  # 100 looks: 2 ms on an idle core
