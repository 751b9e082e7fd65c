"""`bench gpu`: what an epoch takes on a GPU, captured and not, by precision, and its accuracy."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import Parameter
from cyclopts.validators import Number

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.cli import tell
from tune_mnist.mnist.config import Precision, TrainConfig
from tune_mnist.mnist.data import Split, load_mnist, split
from tune_mnist.mnist.device_run import DeviceRun
from tune_mnist.mnist.training import train

VARIANTS: dict[str, tuple[Precision, bool]] = {  # precision; captured as a CUDA graph
    "eager": ("float32", False),
    "captured": ("float32", True),
    "captured tf32": ("tf32", True),
    "captured bf16": ("bf16", True),
}
EXACT = "captured"
NEXT = "next run of its kind"
CONFIG = TrainConfig(  # what the default space begins with: the epochs that a search trains
    lr=0.05,
    nesterov=True,
    weight_decay=5e-4,
    schedule="onecycle",
    dropout=0.02,
    rotation=8,
    shift=0.06,
    scale=0.06,
    ema_decay=0.998,
)


@dataclass(frozen=True, kw_only=True)
class GpuSettings:
    """Time epochs of 469 steps and 15,000 images' evaluation on a GPU, and compare accuracies."""

    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 15
    """Turns of each variant, an epoch each; medians are over these."""

    seeds: Annotated[int, Parameter(validator=Number(gte=1))] = 5
    """Trainings of each precision, for its test accuracy."""

    epochs: Annotated[int, Parameter(validator=Number(gte=1))] = 20
    """Length of each of those."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """Fewer turns, and one training of two epochs."""

    save: Path | None = None
    """Write every number to this CSV file."""

    data_dir: Path | None = None
    """Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."""


def gpu(settings: GpuSettings) -> None:
    """Measure and print; without a GPU say so."""
    taken = Measurements("gpu")
    if torch.cuda.is_available():
        tell(f"on one {torch.cuda.get_device_name()}")
        if settings.quick:
            settings = replace(settings, rounds=min(settings.rounds, 5), seeds=1, epochs=2)
        measure(taken, data_of(settings.data_dir), settings, "cuda")
    else:
        tell("skipped: torch finds no GPU that it can use here")
    taken.finish(keys_of(taken), settings.save)


def data_of(data_dir: Path | None) -> Split:
    """Return all 60,000 images to train on, and as many to evaluate as a search's trials have."""
    mnist = load_mnist(data_dir)
    held_out = split(mnist, holdout=True)
    evaluated = {"val_images": held_out.val_images, "val_labels": held_out.val_labels}
    return replace(split(mnist, holdout=False), **evaluated)


def measure(taken: Measurements, data: Split, settings: GpuSettings, device: str) -> None:
    """Time epochs of all variants in turns, then train each precision to its end."""
    runs = {name: timed(name, data, 2 * settings.rounds, device) for name in VARIANTS}
    for turn in range(settings.rounds):
        for name, run in runs.items():
            # The first of two brings images and weights back to where another run's were.
            first, found = next(run), next(run)
            if turn == 0:  # and captures the step
                taken.add(name, "first_epoch_s", first["epoch_s"])
            for quantity, value in found.items():
                taken.add(name, quantity, value)
    other = replace(CONFIG, lr=0.01, dropout=0.1, nesterov=False, rotation=3)
    taken.add(NEXT, "first_epoch_s", next(timed(EXACT, data, 1, device, other))["epoch_s"])
    time_trial(taken, data, settings.rounds, device)
    for seed in range(settings.seeds):
        for name, (precision, captured) in VARIANTS.items():
            if captured:
                accuracy = trained_accuracy(precision, data, settings.epochs, seed, device)
                taken.add(name, "test_accuracy", accuracy)


def timed(
    variant: str, data: Split, epochs: int, device: str, config: TrainConfig = CONFIG
) -> Iterator[dict[str, float]]:
    """Train a variant, one epoch each time it is asked, and say what that took."""
    precision, captured = VARIANTS[variant]
    run = DeviceRun(
        *(config, data),
        epochs=epochs,
        seed=0,
        device=device,
        precision=precision,
        captured=captured and device != "cpu",
    )
    for done in range(epochs):
        began = time.perf_counter()
        epoch = run.train_epoch(done, None)
        yield {
            "epoch_s": time.perf_counter() - began,
            "step_ms": epoch.seconds * 1e3 / run.steps,
            "evaluation_s": epoch.evaluation_seconds,
        }


def time_trial(taken: Measurements, data: Split, epochs: int, device: str) -> None:
    """Time a trial's epochs, with all that a worker does but its report."""
    results = train(CONFIG, data, epochs=epochs + 1, seed=0, device=device)
    next(results)
    for _ in range(epochs):
        began = time.perf_counter()
        next(results)
        taken.add(EXACT, "trial_epoch_s", time.perf_counter() - began)


def trained_accuracy(
    precision: Precision, data: Split, epochs: int, seed: int, device: str
) -> float:
    """Return the test accuracy after the last of so many epochs."""
    run = DeviceRun(
        *(CONFIG, data),
        epochs=epochs,
        seed=seed,
        device=device,
        precision=precision,
        captured=device != "cpu",
    )
    return [run.train_epoch(done, None) for done in range(epochs)][-1].test.accuracy


def keys_of(taken: Measurements) -> dict[str, Any]:
    """Return what the line of JSON says; null where nothing was measured."""
    epoch = {name: taken.median(name, "epoch_s") for name in VARIANTS}
    exact = taken.median(EXACT, "test_accuracy")
    return {
        "epoch_s": epoch[EXACT],
        "eager_epoch_s": epoch["eager"],
        "tf32_epoch_s": epoch["captured tf32"],
        "bf16_epoch_s": epoch["captured bf16"],
        "trial_epoch_s": taken.median(EXACT, "trial_epoch_s"),
        "speedup": epoch["eager"] / epoch[EXACT],
        "step_ms": taken.median(EXACT, "step_ms"),
        "evaluation_s": taken.median(EXACT, "evaluation_s"),
        "first_epoch_s": taken.median(EXACT, "first_epoch_s"),
        "next_first_epoch_s": taken.median(NEXT, "first_epoch_s"),
        "test_accuracy": exact,
        "tf32_accuracy_change": taken.median("captured tf32", "test_accuracy") - exact,
        "bf16_accuracy_change": taken.median("captured bf16", "test_accuracy") - exact,
        "n": len(taken.values(EXACT, "epoch_s")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
