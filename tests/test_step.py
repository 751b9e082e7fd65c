"""The one step that all devices share and what moves its weights; a GPU's part is in test_cuda."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tune_mnist.benchmarks.textbook import build_optimizer, build_schedule
from tune_mnist.mnist import cuda
from tune_mnist.mnist.checkpoint import initial_state, put_state
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.cpu import backend
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.forward import evaluation_forward, training_forward
from tune_mnist.mnist.images import SplitTensors, scaled
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.step import (
    FLAT_OPTIMIZERS,
    FlatNet,
    Step,
    StepKind,
    Take,
    averaging_decay,
    constants,
    flat,
    learning_rates,
    step_table,
    table_columns,
)
from tune_mnist.mnist.training import draw_net

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS, STEPS = 7, 13
SGD = TrainConfig(lr=0.02, batch_size=8, dropout=0)
ADAMW = TrainConfig(optimizer="adamw", lr=0.002, batch_size=8, dropout=0)
DISTORTED: dict[str, Any] = {"rotation": 10.0, "shift": 0.1, "scale": 0.1, "elastic": 0.04}


@pytest.fixture
def data(small_mnist: Mnist) -> Split:
    """28 images: three batches of 8 and one of 4."""
    return split(small_mnist, holdout=True, images=28)


def make_step(config: TrainConfig, data: Split, *, known: bool) -> Step:
    """A fresh step that knows its hyperparameters, as a CPU's, or reads them, as a GPU's."""
    net = draw_net(config, seed=1)
    step = Step(
        StepKind.of(config, done=0, epochs=1),
        SplitTensors.on(data, "cpu"),
        torch.Generator(),
        partial(training_forward, backend=backend(net, threads=1)) if known else training_forward,
        constants(config) if known else {},
    )
    put_state(initial_state(net, config), step)
    return step


def take_all(
    step: Step, take: Take, config: TrainConfig, after: Callable[[], None] = lambda: None
) -> Tensor:
    batches = torch.arange(28).split(config.batch_size)  # type: ignore[no-untyped-call]
    rates = learning_rates(config, epochs=1, steps_per_epoch=len(batches))
    losses = []
    for number, row in enumerate(step_table(config, rates, 0)):
        step.generator.manual_seed(number)
        losses.append(take(batches[number], row).clone())
        after()
    return torch.stack(losses)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(
    "config",
    [
        replace(SGD, momentum=0),
        replace(SGD, nesterov=True, weight_decay=0.001, schedule="onecycle", ema_decay=0.9),
        replace(SGD, batch_size=7, label_smoothing=0.1, schedule="cosine", **DISTORTED),
        replace(SGD, batch_size=200, rotation=5.0),
        replace(ADAMW, weight_decay=0.1, beta1=0.8, beta2=0.99, ema_decay=0.99),
        replace(ADAMW, label_smoothing=0.2, **DISTORTED),
    ],
    ids=["sgd", "nesterov", "distorted", "one-batch", "adamw", "adamw-distorted"],
)
def test_a_replayed_step_moves_everything_as_a_cpus_does(
    data: Split, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: a replay reads batch, numbers and dropout rate from where they never move."""
    monkeypatch.setattr(cuda, "capture", lambda work, *_: work)
    of_cpu = make_step(config, data, known=True)
    expected = take_all(of_cpu, of_cpu.take, config)
    replayed = make_step(config, data, known=False)
    sizes = {min(28, config.batch_size), 28 % config.batch_size}
    found = take_all(replayed, cuda.captured(replayed, sizes, None), config)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    for one, other in zip(replayed.vectors, of_cpu.vectors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_the_average_follows_the_net_by_its_formula_and_is_the_net_where_none_is_asked(
    data: Split,
) -> None:
    config = replace(SGD, ema_decay=0.25)
    step = make_step(config, data, known=True)
    expected, seen = step.net.vector.clone(), 0

    def follow() -> None:
        nonlocal expected, seen
        decay = min(0.25, (1 + seen) / (10 + seen))
        expected = decay * expected + (1 - decay) * step.net.vector
        seen += 1

    take_all(step, step.take, config, after=follow)
    torch.testing.assert_close(step.average.vector, expected)
    assert not torch.equal(step.average.vector, step.net.vector)
    without = make_step(SGD, data, known=True)
    take_all(without, without.take, SGD)
    assert torch.equal(without.average.vector, without.net.vector)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_and_an_evaluation_read_no_value_from_their_device(
    data: Split, optimizer: Any
) -> None:
    # The meta device has shapes but no values: whatever would wait for a GPU raises there.
    nowhere: Any = None
    kind, images = StepKind(optimizer, True, True), SplitTensors.on(data, "meta")
    step = Step(kind, images, nowhere, training_forward, known={})
    row = torch.empty(len(step.columns), device="meta")
    assert step.take(torch.empty(8, dtype=torch.int64, device="meta"), row).device.type == "meta"
    assert evaluation_forward(step.net.net, scaled(images.val_images)).shape[1] == 10


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
