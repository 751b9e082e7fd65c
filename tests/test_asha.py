import random
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from tune_mnist.tuning.asha import Rungs

ADVANCE = [(1, 3.0), (1, 2.0), (2, 3.0), (1, 4.0), (3, 2.5), (1, 1.5), (5, 2.0), (25, 3.0)]


@pytest.mark.parametrize(
    ("grace", "factor", "budget", "rungs"),
    [
        (1, 3, 20, (1, 3, 9)),
        (1, 3, 28, (1, 3, 9, 27)),
        (4, 3, 40, (4, 12, 36)),
        (3, 2.5, 50, (3, 8, 19, 47)),
        (1, 1.5, 20, (1, 2, 3, 4, 6, 8, 12, 18)),
        (30, 3, 20, ()),
        (1, 3, 1, ()),
        (1, 1e300, 20, (1,)),
        (1, 1.1, 20, (*range(1, 13), 14, 15, 16, 18)),  # milestones that share an epoch
        (1, 1 + 1e-12, 20, (*range(1, 20),)),
    ],
)
def test_rungs_lie_at_the_first_epoch_at_or_after_each_power_of_the_factor(
    grace: int, factor: float, budget: int, rungs: tuple[int, ...]
) -> None:
    assert Rungs(grace, factor, budget).epochs == rungs


@pytest.mark.parametrize(("grace", "factor"), ADVANCE)
@pytest.mark.parametrize("levels", [5, 5000])
def test_decisions_are_those_of_rays_asha_once_a_rung_has_seen_enough(
    grace: int, factor: float, levels: int
) -> None:
    generator = random.Random(f"{grace} {factor} {levels}")
    budget, stopped_by_ray = 20, 0
    for _ in range(8):
        ours = Rungs(grace, factor, budget)
        rays = _Bracket(grace, budget, factor, 0)
        epochs, seen = dict.fromkeys(range(60), 0), Counter[int]()
        while epochs:
            trial = generator.choice(list(epochs)[:8])  # eight at a time, in any order
            epochs[trial] += 1
            if epochs[trial] >= budget:
                del epochs[trial]
                continue
            value = generator.randrange(levels) / levels  # few levels: many ties
            action = rays.on_result(
                cast(Any, SimpleNamespace(trial_id=trial)), epochs[trial], value
            )
            stop = ours.should_stop(trial, epochs[trial], value)
            seen[epochs[trial]] += 1
            enough = seen[epochs[trial]] >= factor
            assert stop == (action == TrialScheduler.STOP and enough)
            if stop:
                stopped_by_ray += 1
                del epochs[trial]
    assert (stopped_by_ray > 50) == (grace < budget)


def reports(generator: random.Random) -> list[tuple[int, int, float]]:
    """Some trials' values at epochs 1 to 12, interleaved at random."""
    left = {trial: iter(range(1, 13)) for trial in range(30)}
    found = []
    while left:
        trial = generator.choice(list(left))
        if epoch := next(left[trial], None):
            found.append((trial, epoch, generator.random()))
        else:
            del left[trial]
    return found


def told(reports: list[tuple[int, int, float]]) -> tuple[Rungs, list[bool]]:
    rungs = Rungs(1, 3, 20)
    return rungs, [rungs.should_stop(*report) for report in reports]


def test_a_decision_stays_what_it_was_whatever_came_later() -> None:
    seen = reports(random.Random(1))
    rungs, first = told(seen)
    assert [rungs.should_stop(*report) for report in seen] == first
    # A value that differs when a trial is trained again changes nothing either.
    assert [rungs.should_stop(trial, epoch, 0.0) for trial, epoch, _ in seen] == first
    assert any(first)


def test_what_is_recorded_does_not_depend_on_the_order() -> None:
    seen = reports(random.Random(3))
    (one, _), (other, _) = told(seen), told(seen[::-1])
    for epoch in one.epochs:
        for value in (0.1, 0.3, 0.5, 0.6, 0.65, 0.7, 0.9):
            newcomer = (1000 + int(100 * value), epoch, value)
            assert one.should_stop(*newcomer) == other.should_stop(*newcomer)


def test_a_rung_decides_once_it_has_seen_as_many_finite_values_as_one_trial_continues_of() -> None:
    rungs = Rungs(1, 3, 20)
    for trial, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        assert not rungs.should_stop(trial, 1, value)
    # The best of one, the worse of two, and then those who are not among the best third.
    stops = [rungs.should_stop(3 + place, 1, 0.9 - place / 10) for place in range(4)]
    assert stops == [False, False, True, True]
