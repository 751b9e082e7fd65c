import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tune_mnist.benchmarks.textbook import build_optimizer, build_schedule
from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.epoch import draw_net, draw_order, draw_seeds
from tune_mnist.mnist.host_run import HostRun
from tune_mnist.mnist.images import normalised, scaled
from tune_mnist.mnist.run_state import State

EPOCHS = 2
SGD = TrainConfig(lr=0.05, nesterov=True, weight_decay=1e-3, batch_size=16, dropout=0)
ADAMW = TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, batch_size=16, dropout=0)


@pytest.fixture
def data(small_mnist: Mnist) -> Split:
    """72 images: four batches of 16 and one of 8."""
    return split(small_mnist, holdout=True, images=72)


def losses_by_torch(config: TrainConfig, data: Split, seed: int) -> Tensor:
    """The losses of the plain modules with torch's optimizer and schedule, [epochs, steps]."""
    net = draw_net(config, seed)
    steps = math.ceil(len(data.train_labels) / config.batch_size)
    optimizer = build_optimizer(net, config)
    schedule = build_schedule(optimizer, config, EPOCHS, steps)
    losses = []
    for epoch in range(1, EPOCHS + 1):
        order = draw_order(len(data.train_labels), draw_seeds(seed, epoch)[0])
        for batch in torch.split(order, config.batch_size):
            images = normalised(scaled(torch.from_numpy(data.train_images)[batch]).double())
            labels = torch.from_numpy(data.train_labels)[batch].long()
            optimizer.zero_grad()
            loss = nn.functional.nll_loss(net.train()(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses).view(EPOCHS, steps)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_run_is_that_of_plain_modules_with_torchs_optimizer_and_schedule(
    data: Split, config: TrainConfig
) -> None:
    config = replace(config, schedule="onecycle")
    run = HostRun(config, data, epochs=EPOCHS, seed=3)
    found = torch.stack([run.train_epoch(done, None).losses for done in range(EPOCHS)])
    expected = losses_by_torch(config, data, seed=3)
    assert expected[0, 0] - expected[-1, -1] > 0.3  # it learns
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_average_follows_weights_and_statistics_by_its_formula(data: Split) -> None:
    run = HostRun(replace(SGD, ema_decay=0.25), data, epochs=EPOCHS, seed=3)
    expected = run.net.vector.clone()
    seen = 0

    def follow(_: int, __: Tensor) -> None:
        nonlocal expected, seen
        decay = min(0.25, (1 + seen) / (10 + seen))
        expected = decay * expected + (1 - decay) * run.net.vector
        seen += 1

    epochs = [run.train_epoch(done, follow) for done in range(EPOCHS)]
    assert seen == EPOCHS * run.steps
    torch.testing.assert_close(run.average.vector, expected)
    assert not torch.equal(run.average.vector, run.net.vector)
    average = epochs[-1].state["average"]
    assert average["steps"] == seen
    assert average["net"]["features.2.num_batches_tracked"] == seen


def test_without_an_average_the_net_itself_is_scored(data: Split) -> None:
    run = HostRun(SGD, data, epochs=1, seed=3)
    epoch = run.train_epoch(0, None)
    assert epoch.state["average"] is None
    images = normalised(scaled(torch.from_numpy(data.val_images)))
    log_probs = run.net.net.eval()(images)
    loss = nn.functional.nll_loss(log_probs, torch.from_numpy(data.val_labels).long())
    assert epoch.val.loss == pytest.approx(loss.item(), rel=1e-4)


def test_a_state_is_left_alone_by_the_steps_that_follow(data: Split) -> None:
    run = HostRun(SGD, data, epochs=EPOCHS, seed=3)
    first = run.train_epoch(0, None)
    before = {name: value.clone() for name, value in first.state["net"].items()}
    run.train_epoch(1, None)
    assert all(torch.equal(first.state["net"][name], value) for name, value in before.items())


def test_a_state_with_the_optimizers_memory_in_another_form_is_refused(data: Split) -> None:
    run = HostRun(SGD, data, epochs=EPOCHS, seed=3)
    state = run.train_epoch(0, None).state
    of_torch: State = {"state": {}, "param_groups": []}  # as torch's optimizers have it
    with pytest.raises(ConfigError, match="another version"):
        run.load_state_dict(state | {"optimizer": of_torch})
    run.load_state_dict(state)
