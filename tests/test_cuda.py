"""What a GPU adds to a step; all but CUDA itself on a CPU that is not called "cpu"."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.configs import EVERYTHING
from torch import Tensor

from tune_mnist.errors import ConfigError
from tune_mnist.mnist import checkpoint, cuda
from tune_mnist.mnist.config import Precision, TrainConfig, check_precision
from tune_mnist.mnist.cuda import StepKey, Workspace, bfloat16_forward, products_in
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.metrics import EpochMetrics
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.step import StepKind, step_table
from tune_mnist.mnist.training import Run, draw_order, train
from tune_mnist.tuning import packing
from tune_mnist.tuning.resources import TrialResources
from tune_mnist.tuning.settings import SearchSettings

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cpu:0"
SGD = TrainConfig(lr=0.02, batch_size=8, dropout=0)
ADAMW = TrainConfig(optimizer="adamw", lr=0.002, batch_size=8, dropout=0)

eager = partial(Run, epochs=2, device=DEVICE, captured=False)
captured = partial(Run, epochs=2, device=DEVICE)
Epochs = list[tuple[EpochMetrics, Tensor, checkpoint.State]]


@pytest.fixture
def little(small_mnist: Mnist) -> Split:
    """28 images to train on, three batches of 8 and one of 4, and few others."""
    return few(split(small_mnist, holdout=True, images=28))


def few(found: Split) -> Split:
    sets = ("val_images", "val_labels", "test_images", "test_labels")
    return replace(found, **{name: getattr(found, name)[:20] for name in sets})


@pytest.fixture(autouse=True)
def fresh_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every test begin as a fresh worker does."""
    monkeypatch.setattr(cuda, "_workspaces", {})


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Tensor]]:
    """Stand in for the capturing of graphs: the same calls, and then nothing but the work."""
    taken: list[Callable[[], Tensor]] = []

    def capture(work: Callable[[], Tensor], *others: object) -> Callable[[], Tensor]:
        for _ in range(3):
            work()
        taken.append(work)
        return work

    monkeypatch.setattr(cuda, "capture", capture)
    return taken


def epochs_of(run: Run, count: int = 2) -> Epochs:
    return [(*run.train_epoch(done), run.state) for done in range(count)]


def assert_same(found: Epochs, expected: Epochs) -> None:
    """Compare all but times, to the last bit."""
    timeless = {"seconds": 0, "evaluation_seconds": 0}
    for (metrics, losses, state), (of_other, other_losses, other) in zip(
        found, expected, strict=True
    ):
        assert repr(replace(metrics, **timeless)) == repr(replace(of_other, **timeless))
        torch.testing.assert_close((losses, state), (other_losses, other), rtol=0, atol=0)


def test_runs_in_turn_on_one_device_are_what_each_is_alone(little: Split) -> None:
    configs = [EVERYTHING, replace(EVERYTHING, lr=0.01, dropout=0.4, rotation=5, ema_decay=0), SGD]
    runs = [partial(eager, each, little, seed=seed) for seed, each in enumerate(configs)]
    alone = []
    for run in runs:
        cuda._workspaces.clear()
        alone.append(epochs_of(run()))
    one_after_another = [epochs_of(run()) for run in runs]
    side_by_side = [run() for run in runs]
    first = [epochs_of(run, 1)[0] for run in side_by_side]
    second = [(*run.train_epoch(1), run.state) for run in side_by_side]
    for number, expected in enumerate(alone):
        assert_same(one_after_another[number], expected)
        assert_same([first[number], second[number]], expected)


def test_runs_on_other_images_may_take_turns_as_well(little: Split, small_mnist: Mnist) -> None:
    larger = few(split(small_mnist, holdout=True, images=40))
    mixed = replace(little, train_images=little.train_images[::-1].copy())  # of the same size
    first, other, on_mixed, again = (
        epochs_of(eager(SGD, each, seed=1), 1) for each in (little, larger, mixed, little)
    )
    assert_same(first, again)
    assert len(other[0][1]) == 5
    assert not torch.equal(on_mixed[0][1], first[0][1])


def test_captured_steps_serve_all_runs_of_their_kind_and_leave_no_trace(
    little: Split, captures: list[Callable[[], Tensor]]
) -> None:
    configs = [
        EVERYTHING,
        replace(EVERYTHING, lr=0.01, nesterov=False, momentum=0.5, ema_decay=0, dropout=0),
        replace(EVERYTHING, schedule="cosine", rotation=3, scale=0, weight_decay=0),
    ]
    for seed, config in enumerate(configs):
        found = epochs_of(captured(config, little, seed=seed))
        assert_same(found, epochs_of(eager(config, little, seed=seed)))
        assert len(captures) == 2  # a whole batch and the last one
    for other, expected in ((SGD, 4), (ADAMW, 6), (replace(SGD, batch_size=7), 7)):
        epochs_of(captured(other, little, seed=1), 1)
        assert len(captures) == expected  # four batches of 7 are all whole


def test_only_so_many_steps_are_kept_prepared(
    little: Split, captures: list[Callable[[], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_MOST_STEPS", 2)
    kept = []
    for size in (4, 7, 4, 14, 4, 7):
        epochs_of(captured(replace(SGD, batch_size=size), little, seed=1), 1)
        kept.append(len(captures))
    assert kept == [1, 2, 2, 3, 3, 4]


def test_an_epoch_that_is_broken_off_is_trained_again_from_its_start(little: Split) -> None:
    expected = epochs_of(eager(EVERYTHING, little, seed=1))

    def break_off(number: int, loss: Tensor) -> None:
        if number == 3:
            raise KeyboardInterrupt

    run = eager(EVERYTHING, little, seed=1)
    found = epochs_of(run, 1)
    with pytest.raises(KeyboardInterrupt):
        run.train_epoch(1, break_off)
    assert_same([*found, (*run.train_epoch(1), run.state)], expected)


def test_in_bfloat16_losses_are_near_and_weights_stay_float32(little: Split) -> None:
    ((_, found, state),), ((_, exact, _),) = (
        epochs_of(eager(replace(SGD, lr=1e-3), little, seed=1, precision=precision), 1)
        for precision in ("bf16", "float32")
    )
    torch.testing.assert_close(found[:4], exact[:4], rtol=0.03, atol=0)
    assert not torch.equal(found[0], exact[0])
    assert state["net"]["classifier.weight"].dtype == torch.float32
    log_probs = bfloat16_forward(Net(), torch.rand(3, 1, 28, 28), 0.0, torch.Generator())
    assert log_probs.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")  # only the forward pass computes so


def settings_of_torch() -> tuple[str, str]:
    cudnn: Any = torch.backends.cudnn
    return cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")]
)
def test_products_are_exact_unless_tf32_is_asked_for(precision: Precision, expected: str) -> None:
    before = settings_of_torch()
    with pytest.raises(KeyboardInterrupt), products_in(precision):
        assert settings_of_torch() == (expected, expected)
        raise KeyboardInterrupt
    assert settings_of_torch() == before


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_cpu_computes_in_float32_only(
    precision: Precision, little: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_precision(precision, "cuda")
    with pytest.raises(ConfigError, match=f"{precision} is for GPUs"):
        next(train(TrainConfig(), little, epochs=1, seed=0, precision=precision))
    # A search refuses it before it starts.
    monkeypatch.setattr(packing, "_asked", lambda _: TrialResources(cpus=1, gpus=0))
    with pytest.raises(ConfigError, match=f"--precision {precision}"):
        packing.settle_resources(SearchSettings(), little, precision)
    monkeypatch.setattr(packing, "_asked", lambda _: TrialResources(cpus=1, gpus=0.25))
    assert packing.settle_resources(SearchSettings(), little, precision).gpus == 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    sgd = TrainConfig(lr=0.02, nesterov=True, weight_decay=1e-3, batch_size=64, dropout=0)
    adamw = TrainConfig(optimizer="adamw", lr=0.002, weight_decay=0.01, batch_size=64, dropout=0)
    noisy = replace(EVERYTHING, batch_size=64, schedule="constant")

    @pytest.fixture
    def data(self, small_mnist: Mnist) -> Split:
        """300 images to train on: four batches of 64 and one of 44."""
        return split(small_mnist, holdout=True, images=300)

    def losses(self, data: Split, config: TrainConfig, **options: Any) -> Tensor:
        run = Run(config, data, epochs=2, **{"seed": 1, "device": "cuda", **options})
        return torch.cat([losses for _, losses, _ in epochs_of(run)])

    @pytest.mark.parametrize("config", [sgd, adamw, noisy], ids=["sgd", "adamw", "noisy"])
    def test_a_captured_step_does_what_its_operations_and_a_processor_do(
        self, data: Split, config: TrainConfig
    ) -> None:
        found, plain = (self.losses(data, config, captured=each) for each in (True, False))
        # Draws included; a GPU may add up in another order each time, which training enlarges.
        torch.testing.assert_close(found[:5], plain[:5], rtol=0.02, atol=0)
        torch.testing.assert_close(found[0], plain[0], rtol=1e-4, atol=0)
        if config is not self.noisy:  # a processor draws otherwise
            expected = self.losses(data, config, device="cpu")
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=0)
            torch.testing.assert_close(found[:5], expected[:5], rtol=0.05, atol=0)

    def test_a_next_run_of_the_kind_captures_nothing_and_reads_its_own_hyperparameters(
        self, data: Split, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes = {"dropout": 0.1, "nesterov": False, "rotation": 3, "label_smoothing": 0.1}
        second = replace(self.noisy, lr=0.005, **changes)  # type: ignore[arg-type]
        alone = self.losses(data, second, seed=2)
        cuda._workspaces.clear()
        self.losses(data, self.noisy)
        monkeypatch.delattr(cuda, "capture")
        after_another = self.losses(data, second, seed=2)
        torch.testing.assert_close(after_another[0], alone[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(after_another, alone, rtol=0.05, atol=0)

    def test_every_replay_draws_anew_and_a_seed_draws_the_same_again(self, data: Split) -> None:
        config = replace(self.noisy, momentum=0, nesterov=False, weight_decay=0)
        key = StepKey(StepKind("sgd", True, True), 64, "float32", captured=True)
        state = Run(config, data, epochs=1, seed=1, device="cuda").state
        batch = draw_order(64, 1).to("cuda")
        row = step_table(config, torch.full((1,), 1e-30).numpy(), 0)[0].to("cuda")

        def drawn(seed: int) -> Tensor:
            with Workspace.on("cuda", data).lend(key, data, dict(state)) as prepared:
                prepared.step.generator.manual_seed(seed)
                return torch.stack([prepared.take(batch, row).clone() for _ in range(4)]).cpu()

        first, again, other = drawn(1), drawn(1), drawn(2)
        assert len(set(first.tolist())) == 4
        torch.testing.assert_close(first, again, rtol=1e-4, atol=0)
        assert not torch.allclose(first, other, rtol=1e-4)

    @pytest.mark.parametrize("captured", [True, False])
    def test_no_step_waits_for_the_gpu(self, data: Split, captured: bool) -> None:
        run = Run(self.noisy, data, epochs=1, seed=1, device="cuda", captured=captured)
        order = draw_order(300, 1).to("cuda")
        table = step_table(self.noisy, run.rates, 0).to("cuda")
        with run._prepared_step(0) as prepared:
            torch.cuda.set_sync_debug_mode("error")
            try:
                run._take_steps(prepared.take, order, table, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("precision", ["tf32", "bf16"])
    def test_less_precise_steps_are_near_the_precise_ones(
        self, data: Split, precision: Precision
    ) -> None:
        found, exact = (
            self.losses(data, self.sgd, precision=each) for each in (precision, "float32")
        )
        torch.testing.assert_close(found[:3], exact[:3], rtol=0.05, atol=0)

    def test_a_run_resumes_on_either_device(self, data: Split) -> None:
        expected = epochs_of(Run(self.sgd, data, epochs=2, seed=1, device="cuda"))
        for device in ("cpu", "cuda"):
            run = Run(self.sgd, data, epochs=2, seed=1, device=device)
            run.state = expected[0][2]
            _, losses = run.train_epoch(1)
            torch.testing.assert_close(losses[0], expected[1][1][0], rtol=1e-3, atol=0)
