"""The training step captured as a CUDA graph; what does not need a GPU is in test_device_run."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tune_mnist.mnist import device_step, workspace
from tune_mnist.mnist.config import Precision, TrainConfig
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.device_run import DeviceRun
from tune_mnist.mnist.device_step import StepKind, step_columns
from tune_mnist.mnist.epoch import Epoch, draw_order
from tune_mnist.mnist.host_run import HostRun
from tune_mnist.mnist.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SGD = TrainConfig(lr=0.02, nesterov=True, weight_decay=1e-3, batch_size=64, dropout=0)
ADAMW = TrainConfig(optimizer="adamw", lr=0.002, weight_decay=0.01, batch_size=64, dropout=0)
NOISY = replace(SGD, dropout=0.3, rotation=10, shift=0.1, scale=0.1, elastic=0.04, ema_decay=0.9)


@pytest.fixture(autouse=True)
def fresh_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_workspaces", {})


@pytest.fixture
def data(small_mnist: Mnist) -> Split:
    """300 images to train on: four batches of 64 and one of 44."""
    return split(small_mnist, holdout=True, images=300)


def train(
    data: Split,
    config: TrainConfig,
    captured: bool = True,
    precision: Precision = "float32",
    seed: int = 1,
) -> list[Epoch]:
    run = DeviceRun(
        *(config, data),
        epochs=2,
        seed=seed,
        device="cuda",
        precision=precision,
        captured=captured,
    )
    return [run.train_epoch(done, None) for done in range(2)]


def losses(epochs: list[Epoch]) -> Tensor:
    return torch.cat([epoch.losses for epoch in epochs])


@pytest.mark.parametrize("config", [SGD, ADAMW, NOISY], ids=["sgd", "adamw", "noisy"])
def test_a_captured_step_does_what_its_operations_do(data: Split, config: TrainConfig) -> None:
    captured, plain = (train(data, config, captured=each) for each in (True, False))
    # Draws included; a GPU may add up in another order each time, which training makes larger.
    torch.testing.assert_close(losses(captured)[:5], losses(plain)[:5], rtol=0.02, atol=0)
    torch.testing.assert_close(losses(captured)[0], losses(plain)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_captured_step_does_what_a_processor_does(data: Split, config: TrainConfig) -> None:
    expected = HostRun(config, data, epochs=2, seed=1).train_epoch(0, None)
    found = train(data, config)[0]
    torch.testing.assert_close(found.losses[0], expected.losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found.losses, expected.losses, rtol=0.05, atol=0)


def test_a_next_run_of_the_kind_captures_nothing_and_reads_its_own_hyperparameters(
    data: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = replace(NOISY, lr=0.005, dropout=0.1, nesterov=False, rotation=3, label_smoothing=0.1)
    alone = train(data, second, seed=2)
    workspace._workspaces.clear()
    train(data, NOISY)
    monkeypatch.delattr(device_step, "capture")
    after_another = train(data, second, seed=2)
    torch.testing.assert_close(losses(after_another)[0], losses(alone)[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses(after_another), losses(alone), rtol=0.05, atol=0)


def test_every_replay_draws_anew_and_a_seed_draws_the_same_again(data: Split) -> None:
    place = Workspace.on("cuda", data)
    place.data.fill(data)
    step = place.step(StepKind("sgd", 64, True, True, "float32", captured=True))
    config = replace(NOISY, lr=1e-30, momentum=0, nesterov=False, weight_decay=0)
    order = draw_order(64, 1).repeat(5)[:300]  # the same batch each time

    def drawn(seed: int) -> Tensor:
        torch.nn.init.normal_(step.net.weights, std=0.1)
        step.net.weights.copy_(torch.linspace(-0.3, 0.3, len(step.net.weights)))
        step.begin_epoch(order, step_columns(config, torch.full((5,), 1e-30).numpy(), 0), seed)
        for number in range(4):
            step.take(number)
        return step.losses[:4].cpu()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert len(set(first.tolist())) == 4
    torch.testing.assert_close(first, again, rtol=1e-4, atol=0)
    assert not torch.allclose(first, other, rtol=1e-4)


def test_no_step_waits_for_the_gpu(data: Split) -> None:
    for captured in (True, False):
        place = Workspace.on("cuda", data)
        place.data.fill(data)
        step = place.step(StepKind("adamw", 64, True, True, "float32", captured))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(step.steps):
                step.take(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_less_precise_steps_are_near_the_precise_ones(data: Split, precision: Precision) -> None:
    found, exact = train(data, SGD, precision=precision), train(data, SGD)
    torch.testing.assert_close(losses(found)[:3], losses(exact)[:3], rtol=0.05, atol=0)
    assert found[0].state["net"]["classifier.weight"].dtype == torch.float32


def test_a_run_goes_on_from_its_state_on_a_processor_and_back(data: Split) -> None:
    expected = train(data, SGD)
    host = HostRun(SGD, data, epochs=2, seed=1)
    host.load_state_dict(expected[0].state)
    on_host = host.train_epoch(1, None)
    torch.testing.assert_close(on_host.losses[0], expected[1].losses[0], rtol=1e-3, atol=0)
