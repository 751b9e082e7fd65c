import copy
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
from tune_mnist.mnist.fused import training_forward
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.optim import Average, build_optimizer, learning_rates

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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            TrainConfig(lr=0.1, momentum=0.8, nesterov=True, weight_decay=1e-3),
            {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 1e-3},
        ),
        (
            TrainConfig(optimizer="adamw", lr=0.002, beta1=0.8, beta2=0.99, weight_decay=0.1),
            {"lr": 0.002, "betas": (0.8, 0.99), "weight_decay": 0.1},
        ),
    ],
)
def test_the_optimizer_is_what_the_configuration_says(
    config: TrainConfig, expected: dict[str, Any]
) -> None:
    net = Net()
    (group,) = build_optimizer(net, config).param_groups
    assert {name: group[name] for name in expected} == expected
    assert len(group["params"]) == len(list(net.parameters()))


def train_a_step(net: Net, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 1, 28, 28, generator=generator)
    optimizer.zero_grad()
    loss = -training_forward(net, images, 0.1, generator)[:, 3].mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def test_the_average_follows_weights_and_statistics_by_its_formula() -> None:
    torch.manual_seed(0)
    net = Net().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(net, TrainConfig(lr=0.1))
    average = Average(net, decay=0.25)
    expected = copy.deepcopy(net.state_dict())
    for step in range(5):
        train_a_step(net, optimizer)
        average.update()
        decay = min(0.25, (1 + step) / (10 + step))
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    torch.testing.assert_close(average.net.state_dict(), expected)
    assert expected["features.2.num_batches_tracked"] == 5
    difference = expected["classifier.weight"] - net.state_dict()["classifier.weight"]
    assert difference.abs().max() > 0


def test_the_average_leaves_the_net_alone() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    average = Average(net, decay=0.5)
    average.update()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in average.net.parameters())


def test_an_average_goes_on_from_its_state() -> None:
    net = Net().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(net, TrainConfig(lr=0.1))
    average = Average(net, decay=0.9)
    for _ in range(3):
        train_a_step(net, optimizer)
        average.update()
    resumed = Average(net, decay=0.9)
    resumed.load_state_dict(copy.deepcopy(average.state_dict()))
    for one in (average, resumed):
        one.update()
    torch.testing.assert_close(resumed.net.state_dict(), average.net.state_dict(), rtol=0, atol=0)
