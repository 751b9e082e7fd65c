"""`bench gpu`: what an epoch takes on a GPU, captured and not, by precision, and its accuracy."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.settings import GpuSettings
from tune_mnist.cli import tell
from tune_mnist.mnist.config import Precision, TrainConfig
from tune_mnist.mnist.data import Split, load_mnist, split
from tune_mnist.mnist.training import Run, train

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


def gpu(settings: GpuSettings) -> None:
    measured = Measurements("gpu")
    if torch.cuda.is_available():
        tell(f"on one {torch.cuda.get_device_name()}")
        if settings.quick:
            settings = replace(settings, rounds=min(settings.rounds, 5), seeds=1, epochs=2)
        measure(measured, data_of(settings.data_dir), settings, "cuda")
    else:
        tell("skipped: torch finds no GPU that it can use here")
    measured.finish(keys_of(measured), settings.save)


def data_of(data_dir: Path | None) -> Split:
    """Return all 60,000 images to train on, and as many to evaluate as a search's trials have."""
    mnist = load_mnist(data_dir)
    held_out = split(mnist, holdout=True)
    evaluated = {"val_images": held_out.val_images, "val_labels": held_out.val_labels}
    return replace(split(mnist, holdout=False), **evaluated)


def measure(measured: Measurements, data: Split, settings: GpuSettings, device: str) -> None:
    """Time epochs of all variants in turns, then train each precision to its end."""
    runs = {name: timed(run_of(name, data, 2 * settings.rounds, device)) for name in VARIANTS}
    for turn in range(settings.rounds):
        for name, run in runs.items():
            # The first of two also puts images and weights back where another run's were.
            first, found = next(run), next(run)
            if turn == 0:  # it captured the step as well
                measured.add(name, "first_epoch_s", first["epoch_s"])
            for quantity, value in found.items():
                measured.add(name, quantity, value)
    other = replace(CONFIG, lr=0.01, dropout=0.1, nesterov=False, rotation=3)
    first = next(timed(run_of(EXACT, data, 1, device, other)))
    measured.add(NEXT, "first_epoch_s", first["epoch_s"])
    time_trial(measured, data, settings.rounds, device)
    for seed in range(settings.seeds):
        for name in (name for name, (_, captured) in VARIANTS.items() if captured):
            trained = run_of(name, data, settings.epochs, device, seed=seed)
            epochs = [trained.train_epoch(done)[0] for done in range(settings.epochs)]
            measured.add(name, "test_accuracy", epochs[-1].test_accuracy)


def run_of(
    name: str, data: Split, epochs: int, device: str, config: TrainConfig = CONFIG, seed: int = 0
) -> Run:
    """Return a training run of a variant; on a CPU nothing is captured."""
    precision, captured = VARIANTS[name]
    return Run(
        *(config, data),
        epochs=epochs,
        seed=seed,
        device=device,
        precision=precision,
        captured=captured,
    )


def timed(run: Run) -> Iterator[dict[str, float]]:
    """Train an epoch for each item and yield what it took."""
    for done in range(run.epochs):
        began = time.perf_counter()
        metrics, _ = run.train_epoch(done)
        yield {
            "epoch_s": time.perf_counter() - began,
            "step_ms": metrics.seconds * 1e3 / run.steps,
            "evaluation_s": metrics.evaluation_seconds,
        }


def time_trial(measured: Measurements, data: Split, epochs: int, device: str) -> None:
    """Time a trial's epochs, with all that a worker does except the report."""
    results = train(CONFIG, data, epochs=epochs + 1, seed=0, device=device)
    next(results)
    for _ in range(epochs):
        began = time.perf_counter()
        next(results)
        measured.add(EXACT, "trial_epoch_s", time.perf_counter() - began)


def keys_of(measured: Measurements) -> dict[str, Any]:
    """Return the values of the line of JSON, NaN where nothing was measured."""
    epoch = measured.medians(VARIANTS, "epoch_s")
    exact = measured.median(EXACT, "test_accuracy")
    return {
        "epoch_s": epoch[EXACT],
        "eager_epoch_s": epoch["eager"],
        "tf32_epoch_s": epoch["captured tf32"],
        "bf16_epoch_s": epoch["captured bf16"],
        "trial_epoch_s": measured.median(EXACT, "trial_epoch_s"),
        "speedup": epoch["eager"] / epoch[EXACT],
        "step_ms": measured.median(EXACT, "step_ms"),
        "evaluation_s": measured.median(EXACT, "evaluation_s"),
        "first_epoch_s": measured.median(EXACT, "first_epoch_s"),
        "next_first_epoch_s": measured.median(NEXT, "first_epoch_s"),
        "test_accuracy": exact,
        "tf32_accuracy_change": measured.median("captured tf32", "test_accuracy") - exact,
        "bf16_accuracy_change": measured.median("captured bf16", "test_accuracy") - exact,
        "n": len(measured.values(EXACT, "epoch_s")),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
