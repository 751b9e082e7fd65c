from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tune_mnist.benchmarks.textbook import build_optimizer, build_schedule
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.optim import (
    FLAT_OPTIMIZERS,
    FlatNet,
    averaging_decay,
    flat,
    learning_rates,
    step_table,
    table_columns,
)

EPOCHS, STEPS = 7, 13
SGD = TrainConfig(lr=0.1)
ADAMW = TrainConfig(optimizer="adamw", lr=0.01)


@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "constant"},
        *(
            {"schedule": "step", "step_every": every, "step_factor": factor}
            for every, factor in [(1, 0.5), (2, 0.1), (3, 1.0), (50, 0.1)]
        ),
        {"schedule": "cosine"},
        *({"schedule": "onecycle", "peak_position": each} for each in (0.05, 0.3, 0.5, 0.99)),
    ],
    ids=lambda schedule: "-".join(map(str, schedule.values())),
)
def test_a_schedule_equals_torchs(schedule: dict[str, Any]) -> None:
    config = TrainConfig(lr=0.2, **schedule)
    optimizer = build_optimizer(nn.Linear(1, 1), config)
    scheduler = build_schedule(optimizer, config, EPOCHS, STEPS)
    expected = []
    for _ in range(EPOCHS * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    found = learning_rates(config, epochs=EPOCHS, steps_per_epoch=STEPS)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


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


@pytest.mark.parametrize(
    "config",
    [
        SGD,
        replace(SGD, momentum=0),
        replace(SGD, momentum=0.7, nesterov=True, weight_decay=0.05),
        replace(SGD, momentum=0, weight_decay=0.3),
        ADAMW,
        replace(ADAMW, beta1=0.5, beta2=0.9, weight_decay=0.5),
        replace(ADAMW, beta1=0, beta2=0),
    ],
)
def test_many_steps_of_an_optimizer_equal_torchs(config: TrainConfig) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(30, 20)
    weights = layer.weight.detach().flatten().clone()
    ours, theirs = FLAT_OPTIMIZERS[config.optimizer](weights), build_optimizer(layer, config)
    rates = config.lr * np.linspace(0.1, 1, 40)
    # In two parts, as epochs are.
    table = torch.cat([step_table(config, rates[:15], 0), step_table(config, rates[15:], 15)])
    for rate, row in zip(rates, table, strict=True):
        gradient = torch.randn(20, 30, generator=generator)
        layer.weight.grad, layer.bias.grad = gradient, torch.zeros(20)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        numbers = dict(zip(table_columns(config.optimizer), row, strict=True))
        ours.update(gradient.flatten(), numbers)
    torch.testing.assert_close(weights.view(20, 30), layer.weight.detach(), rtol=1e-5, atol=1e-6)
    state = theirs.state[layer.weight]
    for name, buffer in ours.buffers.items():
        if name in state:
            torch.testing.assert_close(buffer.view(20, 30), state[name], rtol=1e-5, atol=1e-6)


def test_a_flat_net_is_the_net_whose_state_it_copied() -> None:
    torch.manual_seed(3)
    net = Net(0.0).to(memory_format=torch.channels_last)
    images = torch.randn(6, 1, 28, 28)
    net.train()(images)  # batch norm's statistics are then its own
    found = FlatNet(torch.device("cpu"))
    found.copy_from(net.state_dict())
    assert torch.equal(found.net.eval()(images), net.eval()(images))
    state = found.state_dict(found.vector, batches=1)
    assert state.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(flat(net.parameters()), found.weights)


def test_a_flat_nets_vector_is_its_weights() -> None:
    found = FlatNet(torch.device("cpu"))
    found.vector.fill_(0.5)
    assert all((weight == 0.5).all() for weight in found.net.parameters())
    assert sum(weight.numel() for weight in found.net.parameters()) == len(found.weights) == 26_314
    found.weights[-1] = 2.0
    assert found.net.classifier.bias[-1] == 2.0
