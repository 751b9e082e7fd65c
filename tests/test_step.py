"""The one step that all devices share; what a GPU adds is in test_cuda."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tune_mnist.mnist import cuda
from tune_mnist.mnist.checkpoint import initial_state, put_state
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.cpu import backend
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.forward import training_forward
from tune_mnist.mnist.images import SplitTensors
from tune_mnist.mnist.optim import constants, learning_rates, step_table
from tune_mnist.mnist.step import Step, StepKind, Take
from tune_mnist.mnist.training import draw_net

pytestmark = pytest.mark.usefixtures("one_thread")

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
    """Take an epoch's steps, each with draws of its own, and return their losses."""
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
def test_a_step_reads_no_value_from_its_device(data: Split, optimizer: Any) -> None:
    # The meta device has shapes but no values: whatever would wait for a GPU raises there.
    nowhere: Any = None
    kind, images = StepKind(optimizer, True, True), SplitTensors.on(data, "meta")
    step = Step(kind, images, nowhere, training_forward, known={})
    row = torch.empty(len(step.columns), device="meta")
    assert step.take(torch.empty(8, dtype=torch.int64, device="meta"), row).device.type == "meta"
