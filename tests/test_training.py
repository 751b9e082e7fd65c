import math
import random
import zlib
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from support.configs import EVERYTHING
from torch import Tensor
from torch.nn import functional

from tune_mnist.benchmarks.textbook import build_optimizer, build_schedule
from tune_mnist.errors import ConfigError
from tune_mnist.mnist import cuda, training
from tune_mnist.mnist.checkpoint import State, load_weights, raw_weights, unpack
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.images import normalised, scaled
from tune_mnist.mnist.training import (
    DIVERGENCE_CHECK_EVERY,
    EpochResult,
    Run,
    draw_net,
    draw_order,
    draw_seeds,
    train,
)
from tune_mnist.runs.checkpoints import FORM

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = replace(EVERYTHING, lr=0.05, weight_decay=1e-4, batch_size=64)
ADAMW = TrainConfig(optimizer="adamw", lr=0.003, weight_decay=0.01, schedule="cosine")
PLAIN = TrainConfig(batch_size=64)
HOPELESS = TrainConfig(lr=10, momentum=0.99, batch_size=4)


@pytest.fixture(scope="module")
def data(small_mnist: Mnist) -> Split:
    """300 images to train, 100 to validate and 200 to test on, read-only as in shared memory."""
    found = split(small_mnist, holdout=True, images=300)
    read_only = {name: np.broadcast_to(array, array.shape) for name, array in vars(found).items()}
    return Split(**read_only)


@pytest.fixture(params=["cpu", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU, and a CPU that passes for a GPU: whatever is not called "cpu" is taken for one."""
    if request.param == "cpu":
        return "cpu"
    monkeypatch.setattr(cuda, "capture", lambda work, *_: work)
    monkeypatch.setattr(cuda, "_workspaces", {})
    return "cpu:0"


def timeless(result: EpochResult) -> EpochResult:
    return replace(result, metrics=replace(result.metrics, seconds=0, evaluation_seconds=0))


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_run_resumed_after_any_epoch_ends_as_the_unbroken_one(
    data: Split, config: TrainConfig, device: str
) -> None:
    unbroken = list(map(timeless, train(config, data, epochs=3, seed=1, device=device)))
    assert [result.metrics.epoch for result in unbroken] == [1, 2, 3]
    assert all(len(result.weights) < 200_000 for result in unbroken)
    for done in (1, 2, 3):
        state = unbroken[done - 1].state
        resumed = train(config, data, epochs=3, seed=1, device=device, state=state)
        # With its state, so what follows is the same as well.
        assert list(map(timeless, islice(resumed, 1))) == unbroken[done : done + 1]


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(lr=0.05, nesterov=True, weight_decay=1e-3, batch_size=16, dropout=0),
        TrainConfig(optimizer="adamw", lr=0.01, weight_decay=0.1, batch_size=16, dropout=0),
    ],
    ids=["sgd", "adamw"],
)
def test_a_run_is_that_of_plain_modules_with_torchs_optimizer_and_schedule(
    small_mnist: Mnist, config: TrainConfig, device: str
) -> None:
    config = replace(config, schedule="onecycle")
    data = split(small_mnist, holdout=True, images=72)  # four batches of 16 and one of 8
    run = Run(config, data, epochs=2, seed=3, device=device)
    found = torch.cat([run.train_epoch(done)[1] for done in range(2)])
    expected = losses_by_torch(config, data, epochs=2, seed=3)
    assert expected[0] - expected[-1] > 0.3  # it learns
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def losses_by_torch(config: TrainConfig, data: Split, epochs: int, seed: int) -> Tensor:
    net = draw_net(config, seed)
    optimizer = build_optimizer(net, config)
    steps = math.ceil(len(data.train_labels) / config.batch_size)
    schedule = build_schedule(optimizer, config, epochs, steps)
    losses = []
    for epoch in range(1, epochs + 1):
        order = draw_order(len(data.train_labels), draw_seeds(seed, epoch)[0])
        for batch in torch.split(order, config.batch_size):
            images = normalised(scaled(torch.from_numpy(data.train_images)[batch]).double())
            labels = torch.from_numpy(data.train_labels)[batch].long()
            optimizer.zero_grad()
            loss = functional.nll_loss(net.train()(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.usefixtures("in_double")
def test_a_run_may_move_between_cpu_and_gpu(
    small_mnist: Mnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "capture", lambda work, *_: work)
    data = split(small_mnist, holdout=True, images=72)
    config = replace(ADAMW, dropout=0, batch_size=16, ema_decay=0.9)
    stayed, moved = (Run(config, data, epochs=3, seed=3) for _ in range(2))
    for done, device in enumerate(("cpu", "cpu:0", "cpu")):
        state, moved = moved.state, Run(config, data, epochs=3, seed=3, device=device)
        moved.state = state
        found, expected = moved.train_epoch(done)[1], stayed.train_epoch(done)[1]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_seed_decides_all_and_neither_random_numbers_nor_images_of_the_process_change(
    data: Split, device: str
) -> None:
    def states() -> tuple[object, ...]:
        of_torch, of_numpy = torch.get_rng_state().tolist(), str(np.random.get_state())
        return of_torch, of_numpy, random.getstate(), data.train_images.tobytes()

    torch.manual_seed(1)
    before = states()
    alone = list(map(timeless, train(SGD, data, epochs=2, seed=1, device=device)))
    assert next(train(SGD, data, epochs=2, seed=2, device=device)).weights != alone[0].weights
    assert states() == before

    # Beside another run, with everybody else drawing in between.
    other = train(PLAIN, data, epochs=2, seed=9)
    for number, result in enumerate(train(SGD, data, epochs=2, seed=1, device=device)):
        torch.rand(7)
        next(other)
        assert timeless(result) == alone[number]


def test_a_result_holds_what_its_weights_come_to(data: Split, device: str) -> None:
    result = next(train(SGD, data, epochs=1, seed=1, device=device))
    net, found = load_weights(result.weights), result.metrics.as_dict()
    for name in ("val", "test"):
        images, labels = (getattr(data, f"{name}_{kind}") for kind in ("images", "labels"))
        target = torch.from_numpy(labels.astype(np.int64))
        with torch.no_grad():
            log_probs = net(normalised(scaled(torch.from_numpy(images.copy()))))
        loss = functional.nll_loss(log_probs, target).item()
        correct = int((log_probs.argmax(1) == target).sum())
        assert found[f"{name}_loss"] == pytest.approx(loss, rel=1e-4)
        assert found[f"{name}_accuracy"] == pytest.approx(correct / len(labels))
    assert result.metrics.test_correct == correct
    assert result.metrics.diverged_step is None
    assert min(result.metrics.seconds, result.metrics.evaluation_seconds) > 0


def test_averaged_weights_are_evaluated_while_raw_ones_train_on(data: Split) -> None:
    configs = PLAIN, replace(PLAIN, ema_decay=0.9)
    plain, averaged = (next(train(each, data, epochs=1, seed=1)) for each in configs)
    assert averaged.metrics.train_loss == plain.metrics.train_loss
    assert averaged.weights != plain.weights
    assert averaged.metrics.test_loss != plain.metrics.test_loss
    raw = unpack(raw_weights(averaged.state))
    torch.testing.assert_close(raw, unpack(plain.weights), rtol=0, atol=0)
    average = unpack(averaged.state)["average"]
    assert average["steps"] == average["net"]["features.2.num_batches_tracked"] == 5


def test_a_single_image_trains_and_without_a_holdout_validation_is_nan(
    small_mnist: Mnist, device: str
) -> None:
    data = split(small_mnist, holdout=False, images=1)
    result = next(train(PLAIN, data, epochs=1, seed=1, device=device)).metrics
    assert math.isnan(result.val_loss) and math.isnan(result.val_accuracy)
    assert math.isfinite(result.train_loss) and math.isfinite(result.test_loss)
    assert result.diverged_step is None


def test_every_step_is_announced_with_its_loss(data: Split, device: str) -> None:
    steps: dict[int, float] = {}
    note = lambda number, loss: steps.update({number: loss.item()})  # noqa: E731
    result = next(train(PLAIN, data, epochs=1, seed=1, device=device, on_step=note))
    assert list(steps) == [1, 2, 3, 4, 5]
    assert steps[1] == pytest.approx(math.log(10), abs=0.3)  # that of guessing
    sizes = [64, 64, 64, 64, 300 - 4 * 64]
    assert result.metrics.train_loss == pytest.approx(np.dot(list(steps.values()), sizes) / 300)


def test_every_epoch_takes_every_image_once_in_an_order_of_its_own() -> None:
    first, second = (draw_order(300, draw_seeds(1, epoch)[0]).tolist() for epoch in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(300))


def test_a_diverged_epoch_is_the_last_and_ends_early_on_a_cpu(data: Split, device: str) -> None:
    steps: list[tuple[int, Tensor]] = []
    results = list(
        train(HOPELESS, data, epochs=3, seed=1, device=device, on_step=lambda *s: steps.append(s))
    )
    result = results[-1].metrics
    assert result.epoch == len(results) < 3
    of_epoch = steps[75 * (len(results) - 1) :]
    lost = next(number for number, loss in of_epoch if not loss.isfinite())
    assert result.diverged_step == lost
    if device == "cpu":
        assert len(of_epoch) < min(75, lost + DIVERGENCE_CHECK_EVERY)
    else:
        assert len(of_epoch) == 75
    assert not math.isfinite(result.train_loss)
    for name in ("val_loss", "val_accuracy", "test_loss", "test_accuracy"):
        assert math.isnan(getattr(result, name))


def test_a_net_lost_only_in_evaluation_has_diverged(
    data: Split, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "tally", lambda *_: torch.tensor([20.0, torch.inf]))
    (result,) = train(PLAIN, data, epochs=3, seed=1, device=device)
    assert result.metrics.diverged_step == 5
    assert math.isfinite(result.metrics.train_loss)
    assert math.isnan(result.metrics.test_accuracy)


@pytest.fixture(scope="module")
def state(data: Split) -> bytes:
    """The state after an epoch of the plain run with seed 1."""
    return next(train(PLAIN, data, epochs=2, seed=1)).state


ANOTHER = "another configuration, seed or number of images"


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("config", replace(PLAIN, lr=0.02), ANOTHER),
        ("config", replace(PLAIN, ema_decay=0.9), ANOTHER),
        ("seed", 2, ANOTHER),
        *(("state", length, "damaged") for length in (0, 10, 5000)),
    ],
)
def test_a_state_that_is_damaged_or_of_another_run_is_refused(
    data: Split, state: bytes, name: str, value: Any, why: str
) -> None:
    asked: dict[str, Any] = {"config": PLAIN, "seed": 1, "state": state}
    asked[name] = state[:value] if name == "state" else value
    with pytest.raises(ConfigError, match=why):
        next(train(split=data, epochs=2, **asked))


def form_of(value: Any, name: str = "") -> list[str]:
    """Name everything in a state, with the types and shapes."""
    if isinstance(value, dict):
        return [line for key, each in value.items() for line in form_of(each, f"{name}.{key}")]
    shape = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return [f"{name} {shape or type(value).__name__}"]


def test_a_states_form_has_its_number(data: Split, state: bytes) -> None:
    """If this fails, states from before can no longer be read: raise FORM."""
    config = replace(PLAIN, optimizer="adamw", ema_decay=0.9)
    other = next(train(config, data, epochs=1, seed=1)).state
    lines = "\n".join([*form_of(unpack(state)), *form_of(unpack(other))])
    assert (FORM, zlib.crc32(lines.encode())) == (2, 915747938)


def test_a_state_is_left_alone_by_later_steps_and_one_of_another_form_is_refused(
    data: Split, state: bytes
) -> None:
    run = Run(PLAIN, data, epochs=2, seed=1)
    run.state = first = unpack(state)
    run.train_epoch(1)
    torch.testing.assert_close(first["net"], unpack(state)["net"], rtol=0, atol=0)
    of_torch = State(state={}, param_groups=[])  # as torch's optimizers have it
    run.state = first | {"optimizer": of_torch}
    with pytest.raises(ConfigError, match="another version"):
        run.train_epoch(1)


def test_a_run_can_be_made_longer(data: Split) -> None:
    long = list(train(PLAIN, data, epochs=2, seed=1))
    (short,) = train(PLAIN, data, epochs=1, seed=1)
    (last,) = train(PLAIN, data, epochs=2, seed=1, state=short.state)
    assert timeless(last) == timeless(long[1])
