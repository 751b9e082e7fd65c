from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    StepLR,
)

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.optim import averaging_decay, learning_rates

EPOCHS, STEPS = 7, 13


def rates_of(scheduler: LRScheduler, *, steps_between: int) -> npt.NDArray[np.float64]:
    """The rates that torch's scheduler sets, [EPOCHS * STEPS]."""
    rates = []
    for step in range(1, EPOCHS * STEPS + 1):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        if step % steps_between == 0 and step < EPOCHS * STEPS:
            scheduler.step()
    return np.array(rates)


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_a_constant_rate_stays_the_same() -> None:
    expected = rates_of(LambdaLR(sgd(0.03), lambda _: 1.0), steps_between=1)
    found = learning_rates(TrainConfig(lr=0.03), epochs=EPOCHS, steps_per_epoch=STEPS)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(("every", "factor"), [(1, 0.5), (2, 0.1), (3, 1.0), (50, 0.1)])
def test_the_step_schedule_equals_torchs(every: int, factor: float) -> None:
    config = TrainConfig(lr=0.2, schedule="step", step_every=every, step_factor=factor)
    expected = rates_of(StepLR(sgd(0.2), every, factor), steps_between=STEPS)
    found = learning_rates(config, epochs=EPOCHS, steps_per_epoch=STEPS)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_cosine_schedule_equals_torchs() -> None:
    config = TrainConfig(lr=0.2, schedule="cosine")
    expected = rates_of(CosineAnnealingLR(sgd(0.2), EPOCHS * STEPS), steps_between=1)
    found = learning_rates(config, epochs=EPOCHS, steps_per_epoch=STEPS)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("peak_position", [0.05, 0.3, 0.5, 0.99])
def test_the_onecycle_schedule_equals_torchs(peak_position: float) -> None:
    config = TrainConfig(lr=0.2, schedule="onecycle", peak_position=peak_position)
    scheduler = OneCycleLR(
        sgd(0.2),
        max_lr=0.2,
        total_steps=EPOCHS * STEPS,
        pct_start=peak_position,
        cycle_momentum=False,
    )
    found = learning_rates(config, epochs=EPOCHS, steps_per_epoch=STEPS)
    np.testing.assert_allclose(found, rates_of(scheduler, steps_between=1), rtol=1e-9)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "onecycle"])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (2, 1), (20, 469)])
def test_every_rate_of_every_length_of_run_is_usable(
    schedule: Any, epochs: int, steps: int
) -> None:
    config = TrainConfig(lr=0.2, schedule=schedule, peak_position=0.5)
    rates = learning_rates(config, epochs=epochs, steps_per_epoch=steps)
    assert rates.shape == (epochs * steps,)
    assert np.isfinite(rates).all()
    assert ((rates > 0) & (rates <= 0.2)).all()


def test_an_average_keeps_little_of_its_start_and_then_the_decay_asked_for() -> None:
    kept = averaging_decay(0.9, np.arange(200))
    assert kept[0] == 0.1
    np.testing.assert_allclose(kept, np.minimum(0.9, np.arange(1, 201) / np.arange(10, 210)))
    assert (kept[-100:] == 0.9).all()
