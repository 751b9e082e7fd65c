"""One training run: a generator that yields an EpochResult after every epoch.

The train command, the search's trials, the confirmation and the benchmarks all drive this one
loop. What an epoch is computed with is one of two: `host_run` on a CPU, `device_run` on a GPU.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pickle import UnpicklingError
from typing import Any

import torch

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.config import Precision, TrainConfig, check_precision
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.device_run import DeviceRun
from tune_mnist.mnist.epoch import Epoch, StepListener
from tune_mnist.mnist.evaluation import Score
from tune_mnist.mnist.host_run import HostRun
from tune_mnist.mnist.losses import first_not_finite, mean_per_image
from tune_mnist.mnist.metrics import EpochMetrics
from tune_mnist.mnist.net import Net


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to, and what it takes to go on from it."""

    metrics: EpochMetrics
    state: bytes  # all it takes to go on with the next epoch: see `train`
    weights: bytes  # state_dict of the evaluated net: see `load_weights`


def train(
    config: TrainConfig,
    split: Split,
    *,
    epochs: int,
    seed: int,
    device: str = "cpu",
    precision: Precision = "float32",
    state: bytes | None = None,
    on_step: StepListener | None = None,
) -> Iterator[EpochResult]:
    """Train a fresh net, or go on from a state, and yield each epoch as it finishes.

    Every epoch seeds its own random numbers from (seed, epoch), so that a state needs none and a
    run that was broken off reports what the unbroken one would have, to the last digit on a CPU.

    Args:
        config: the hyperparameters.
        split: the images to train on and to evaluate on.
        epochs: the run's full length, which also stretches the schedule.
        seed: fixes initial weights, order, distortions and dropout (for a number of threads).
        device: "cpu" or "cuda".
        precision: of the training steps on a GPU.
        state: the `state` of an earlier EpochResult of the same run, on whatever device.
        on_step: called after each step with the batch's number (1-based) and its loss.

    Raises:
        ConfigError: the state is damaged, belongs to another run or to another version, or a CPU
            is to compute less precisely.
    """
    check_precision(precision, device)
    run: HostRun | DeviceRun
    if device == "cpu":
        run = HostRun(config, split, epochs=epochs, seed=seed)
    else:
        run = DeviceRun(
            config, split, epochs=epochs, seed=seed, device=device, precision=precision
        )
    images = len(split.train_labels)
    # What a state must agree in to be gone on from; not the length of the schedule.
    identity = {"config": config.as_dict(), "seed": seed, "images": images}
    done = 0
    if state is not None:
        saved = _unpack(state)
        if not isinstance(saved, dict) or saved.get("run") != identity:
            raise ConfigError(
                "the saved state belongs to another configuration, seed or number of images"
            )
        done = saved["epoch"]
        run.load_state_dict(saved)
    while done < epochs:
        epoch = run.train_epoch(done, on_step)
        done += 1
        train_loss = mean_per_image(epoch.losses, images, config.batch_size)
        result = _result(epoch, done, train_loss, identity)
        yield result
        if result.metrics.diverged:
            return


def _result(epoch: Epoch, number: int, train_loss: float, identity: dict[str, Any]) -> EpochResult:
    val, test = epoch.val, epoch.test
    diverged = first_not_finite(epoch.losses)
    if diverged is None and (val.lost or test.lost):
        diverged = len(epoch.losses)  # the last step did it, or batch norm's statistics
    if diverged is not None:
        val = test = Score()
    average = epoch.state["average"]
    metrics = EpochMetrics(
        epoch=number,
        train_loss=train_loss,
        val_loss=val.loss,
        val_accuracy=val.accuracy,
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        test_correct=test.correct,
        seconds=epoch.seconds,
        evaluation_seconds=epoch.evaluation_seconds,
        diverged_step=diverged,
    )
    return EpochResult(
        metrics,
        state=_pack({"run": identity, "epoch": number, **epoch.state}),
        weights=_pack(epoch.state["net"] if average is None else average["net"]),
    )


def load_weights(weights: bytes) -> Net:
    """Build the net from an EpochResult's `weights`, ready for inference."""
    net = Net()
    net.load_state_dict(_unpack(weights))
    return net.eval()


def raw_weights(result: EpochResult) -> bytes:
    """Return the weights as the last step left them, which `weights` may be the average of."""
    return _pack(_unpack(result.state)["net"])


def _pack(value: Any) -> bytes:
    buffer = BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    try:
        return torch.load(BytesIO(packed), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ConfigError("the saved state is damaged") from error
