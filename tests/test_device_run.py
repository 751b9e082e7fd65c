"""A GPU's way to train, on the CPU: all but the capturing of graphs, which test_graphs has."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tune_mnist.mnist import device_step, training, workspace
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.device_run import DeviceRun
from tune_mnist.mnist.device_step import DeviceStep, StepKind
from tune_mnist.mnist.epoch import Epoch
from tune_mnist.mnist.host_run import HostRun
from tune_mnist.mnist.images import SplitTensors
from tune_mnist.mnist.workspace import Workspace

SGD = TrainConfig(lr=0.02, batch_size=8, dropout=0)
ADAMW = TrainConfig(optimizer="adamw", lr=0.002, batch_size=8, dropout=0)
EVERYTHING = TrainConfig(
    lr=0.03,
    nesterov=True,
    weight_decay=1e-3,
    batch_size=8,
    schedule="onecycle",
    dropout=0.2,
    label_smoothing=0.1,
    rotation=10,
    shift=0.1,
    scale=0.1,
    elastic=0.04,
    ema_decay=0.9,
)
HOPELESS = replace(SGD, lr=10, momentum=0.99, batch_size=4)

on_device = partial(DeviceRun, device="cpu", captured=False)


@pytest.fixture
def data(small_mnist: Mnist) -> Split:
    """84 images to train on, ten batches of 8 and one of 4, and few others."""
    return few(split(small_mnist, holdout=True, images=84))


@pytest.fixture
def little(small_mnist: Mnist) -> Split:
    """28 images, three batches of 8 and one of 4, where it is not about many steps."""
    return few(split(small_mnist, holdout=True, images=28))


def few(found: Split) -> Split:
    sets = ("val_images", "val_labels", "test_images", "test_labels")
    return replace(found, **{name: getattr(found, name)[:20] for name in sets})


@pytest.fixture(autouse=True)
def fresh_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have every test begin as a fresh worker does."""
    monkeypatch.setattr(workspace, "_workspaces", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def epochs_of(run: HostRun | DeviceRun, count: int = 2) -> list[Epoch]:
    return [run.train_epoch(done, None) for done in range(count)]


def assert_close(found: Any, expected: Any, **tolerances: Any) -> None:
    """Compare states, whose order and whose optimizers' settings do not matter."""
    match expected:
        case Tensor():
            torch.testing.assert_close(found, expected, check_dtype=False, **tolerances)
        case dict():
            for key in expected.keys() - {"param_groups"}:
                assert_close(found[key], expected[key], **tolerances)
        case _:
            assert found == expected


def assert_same(found: list[Epoch], expected: list[Epoch], **tolerances: Any) -> None:
    """Compare all but times; without tolerances to the last bit."""
    tolerances = tolerances or {"rtol": 0, "atol": 0}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.losses, other.losses, **tolerances)
        assert_close(one.state, other.state, **tolerances)
        for score, of_other in ((one.val, other.val), (one.test, other.test)):
            assert (score.images, score.correct) == (of_other.images, of_other.correct)
            assert score.loss == pytest.approx(of_other.loss, rel=tolerances["rtol"])


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(
    "config",
    [
        replace(SGD, momentum=0),
        replace(SGD, momentum=0.8, weight_decay=0.01),
        replace(SGD, nesterov=True, weight_decay=0.001, schedule="onecycle"),
        replace(SGD, label_smoothing=0.1, schedule="step", step_every=1),
        replace(SGD, ema_decay=0.9, schedule="cosine"),
        replace(ADAMW, weight_decay=0.1, beta1=0.8, beta2=0.99, ema_decay=0.99),
        replace(ADAMW, schedule="onecycle", label_smoothing=0.2, batch_size=7),
        replace(SGD, batch_size=200),  # one batch, and a smaller one
        # Distorted by less than a rounding error, and then not at all.
        replace(ADAMW, ema_decay=0.9, rotation=1e-12, augmented_part=0.5),
        replace(SGD, elastic=1e-12, augmented_part=0.5),
    ],
    ids=[
        *("sgd", "momentum", "nesterov", "smoothing", "average", "adamw", "even", "one-batch"),
        *("augmented-part", "elastic"),
    ],
)
def test_an_epoch_on_a_device_equals_one_on_the_cpu(data: Split, config: TrainConfig) -> None:
    expected = epochs_of(HostRun(config, data, epochs=2, seed=1))
    found = epochs_of(on_device(config, data, epochs=2, seed=1))
    assert_same(found, expected, rtol=1e-7, atol=1e-9)


def test_in_float32_the_first_steps_agree_within_rounding(data: Split) -> None:
    config = replace(EVERYTHING, dropout=0, lr=1e-3, schedule="constant")
    host, device = (run(config, data, epochs=1, seed=1) for run in (HostRun, on_device))
    found, expected = (epochs_of(run, 1)[0].losses for run in (device, host))
    # The first batch is distorted alike as well: its draws are an epoch's first.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    assert not torch.allclose(found[1:], expected[1:], rtol=1e-3)
    config = replace(config, rotation=0, shift=0, scale=0, elastic=0)
    host, device = (run(config, data, epochs=1, seed=1) for run in (HostRun, on_device))
    found, expected = (epochs_of(run, 1)[0].losses for run in (device, host))
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-3, atol=0)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("config", [replace(SGD, ema_decay=0.9), ADAMW], ids=["sgd", "adamw"])
def test_a_run_may_change_between_cpu_and_device(little: Split, config: TrainConfig) -> None:
    expected = epochs_of(HostRun(config, little, epochs=3, seed=1), 3)
    run: HostRun | DeviceRun = HostRun(config, little, epochs=3, seed=1)
    found: list[Epoch] = []
    makes: list[Any] = [HostRun, on_device, HostRun]
    for done, make in enumerate(makes):
        run = make(config, little, epochs=3, seed=1)
        if found:
            run.load_state_dict(found[-1].state)
        found.append(run.train_epoch(done, None))
    assert_same(found, expected, rtol=1e-7, atol=1e-9)


def test_runs_in_turn_on_one_device_are_what_each_is_alone(little: Split) -> None:
    configs = [EVERYTHING, replace(EVERYTHING, lr=0.01, dropout=0.4, rotation=5, ema_decay=0), SGD]
    runs = [
        partial(on_device, each, little, epochs=2, seed=seed) for seed, each in enumerate(configs)
    ]
    alone = []
    for run in runs:
        workspace._workspaces.clear()
        alone.append(epochs_of(run()))
    one_after_another = [epochs_of(run()) for run in runs]
    side_by_side = [run() for run in runs]
    first = [run.train_epoch(0, None) for run in side_by_side]
    second = [run.train_epoch(1, None) for run in side_by_side]
    for number, expected in enumerate(alone):
        assert_same(one_after_another[number], expected)
        assert_same([first[number], second[number]], expected)


def test_runs_on_other_images_may_take_turns_as_well(little: Split, small_mnist: Mnist) -> None:
    others = few(split(small_mnist, holdout=True, images=40))
    mixed = replace(
        little, train_images=little.train_images[::-1].copy()
    )  # as large, so in the same place
    runs = [on_device(SGD, each, epochs=2, seed=1) for each in (little, others, mixed, little)]
    first, other, on_mixed, again = ([run.train_epoch(0, None)] for run in runs)
    assert_same(first, again)
    assert len(other[0].losses) == 5
    assert not torch.equal(on_mixed[0].losses, first[0].losses)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Stand in for the capturing of graphs: the same calls, and then nothing but the work."""
    captured: list[Callable[[], None]] = []

    def capture(work: Callable[[], None], before: Callable[[], object], *others: object) -> Any:
        for _ in range(3):
            before()
            work()
        captured.append(work)
        return work

    monkeypatch.setattr(device_step, "capture", capture)
    return captured


def test_captured_steps_serve_all_runs_of_their_kind_and_leave_no_trace(
    little: Split, captures: list[Callable[[], None]]
) -> None:
    configs = [
        EVERYTHING,
        replace(EVERYTHING, lr=0.01, nesterov=False, momentum=0.5, ema_decay=0, dropout=0),
        replace(EVERYTHING, schedule="cosine", rotation=3, scale=0, weight_decay=0),
    ]
    for number, config in enumerate(configs):
        found = epochs_of(DeviceRun(config, little, epochs=2, seed=number, device="cpu"))
        assert_same(found, epochs_of(on_device(config, little, epochs=2, seed=number)))
        assert len(captures) == 2  # a whole batch and the last one
    for kind, other in enumerate((SGD, ADAMW, replace(SGD, batch_size=7))):
        epochs_of(DeviceRun(other, little, epochs=2, seed=1, device="cpu"), 1)
        assert len(captures) == 2 + [2, 4, 5][kind]  # four batches of 7 are all whole


def test_only_so_many_steps_are_kept_prepared(
    little: Split, captures: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "_MOST_STEPS", 2)
    place = Workspace.on("cpu", little)
    kinds = [StepKind("sgd", size, False, False, "float32", True) for size in (4, 7, 14)]
    for number in (0, 1, 0, 2, 0):
        place.step(kinds[number])
    assert len(captures) == 3
    place.step(kinds[1])
    assert len(captures) == 4


def test_a_step_reads_no_value_from_its_device(little: Split) -> None:
    # The meta device has shapes but no values: whatever would wait for a GPU raises there.
    nowhere: Any = None
    for optimizer in ("sgd", "adamw"):
        kind = StepKind(optimizer, 8, True, True, "float32", captured=False)
        step = DeviceStep(kind, SplitTensors.room_for(little, "meta"), nowhere, None)
        step.take(0)
        step.take(step.steps - 1)
        assert step.losses.device.type == "meta"


def test_an_epoch_that_is_broken_off_is_trained_again_from_its_start(little: Split) -> None:
    expected = epochs_of(on_device(EVERYTHING, little, epochs=2, seed=1))

    def break_off(number: int, loss: Tensor) -> None:
        if number == 3:
            raise KeyboardInterrupt

    run = on_device(EVERYTHING, little, epochs=2, seed=1)
    found = epochs_of(run, 1)
    with pytest.raises(KeyboardInterrupt):
        run.train_epoch(1, break_off)
    assert_same([*found, run.train_epoch(1, None)], expected)


def test_every_step_is_announced_with_its_loss(little: Split) -> None:
    steps: list[tuple[int, Tensor]] = []
    run = on_device(EVERYTHING, little, epochs=2, seed=1)
    run.train_epoch(0, None)
    second = run.train_epoch(1, lambda number, loss: steps.append((number, loss)))
    assert [number for number, _ in steps] == list(range(1, 5))
    assert torch.equal(torch.stack([loss for _, loss in steps]), second.losses)


def test_runs_leave_the_process_random_numbers_alone(little: Split) -> None:
    before = torch.get_rng_state()
    epochs_of(on_device(EVERYTHING, little, epochs=2, seed=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_bfloat16_losses_are_near_and_weights_stay_float32(little: Split) -> None:
    config = replace(SGD, lr=1e-3)
    (found,), (exact,) = (
        epochs_of(on_device(config, little, epochs=1, seed=1, precision=precision), 1)
        for precision in ("bf16", "float32")
    )
    torch.testing.assert_close(found.losses[:4], exact.losses[:4], rtol=0.03, atol=0)
    assert not torch.equal(found.losses[0], exact.losses[0])
    assert found.state["net"]["classifier.weight"].dtype == torch.float32


class OnDevice:
    """What `train` trains on, put in the CPU's place."""

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(training, "HostRun", on_device)


class TestTrain(OnDevice):
    def test_a_resumed_run_ends_as_the_unbroken_one(self, little: Split) -> None:
        unbroken = list(training.train(EVERYTHING, little, epochs=3, seed=1))
        state = unbroken[0].state
        resumed = list(training.train(EVERYTHING, little, epochs=3, seed=1, state=state))
        times = {"seconds": 0, "evaluation_seconds": 0}
        for one, other in zip(resumed, unbroken[1:], strict=True):
            assert replace(one.metrics, **times) == replace(other.metrics, **times)
            found, expected = (
                training.load_weights(result.weights).state_dict() for result in (one, other)
            )
            assert_close(found, expected, rtol=0, atol=0)
        assert len(unbroken[0].weights) < 200_000

    @pytest.mark.usefixtures("in_double")
    def test_divergence_is_told_at_its_step(self, data: Split) -> None:
        found = list(training.train(HOPELESS, data, epochs=3, seed=1))
        host = HostRun(HOPELESS, data, epochs=3, seed=1)
        losses = epochs_of(host, len(found))[-1].losses
        result = found[-1]
        assert result.metrics.diverged_step == int((~losses.isfinite()).nonzero()[0]) + 1
        assert not math.isfinite(result.metrics.train_loss)
        assert math.isnan(result.metrics.val_accuracy)
        assert math.isnan(result.metrics.test_accuracy)

    def test_without_a_holdout_validation_is_nan(self, small_mnist: Mnist) -> None:
        found = few(split(small_mnist, holdout=False, images=24))
        (result,) = training.train(SGD, found, epochs=1, seed=1)
        assert math.isnan(result.metrics.val_loss)
        assert math.isfinite(result.metrics.test_loss)
        assert result.metrics.diverged_step is None
