"""`bench curves`: whole learning curves of random configurations, recorded once to be replayed.

Every configuration trains its full budget; nothing is stopped. After each epoch both the weights
as they are and their running average are scored, so that a replay can judge by either. An
interrupted recording resumes where it was.
"""

import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
import yaml
from torch import Tensor

from tune_mnist.benchmarks.measurements import usable_cores, write_file
from tune_mnist.benchmarks.settings import CurvesSettings
from tune_mnist.cli import tell
from tune_mnist.mnist.checkpoint import load_weights, raw_weights
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.cpu import backend
from tune_mnist.mnist.data import load_mnist, split
from tune_mnist.mnist.forward import Score, evaluate
from tune_mnist.mnist.images import SplitTensors
from tune_mnist.mnist.training import EpochResult, train
from tune_mnist.runs.space import load_space


def curves(settings: CurvesSettings) -> None:
    load_mnist(settings.data_dir)  # fetched once and not by each of the processes
    recorded = pd.read_csv(settings.save) if settings.save.exists() else pd.DataFrame()
    known = set() if recorded.empty else set(recorded["config"])
    pinned = settings.save.with_suffix(".yaml")  # for replays: a space changes, its curves stay
    space = load_space(str(pinned) if pinned.exists() else settings.space)
    if not pinned.exists():
        write_file(pinned, yaml.safe_dump(space.as_dict(), sort_keys=False))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    configs = [space.config(space.sample(study.ask())) for _ in range(settings.configs)]
    waiting = [(number, each) for number, each in enumerate(configs) if number not in known]
    epochs, images = settings.epochs or space.epochs, settings.images
    train_one = partial(record, epochs=epochs, images=images, data_dir=settings.data_dir)
    at_once = settings.at_once or usable_cores()
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train_one, *each) for each in waiting]):
            curve = pd.DataFrame(future.result())
            recorded = pd.concat([recorded, curve], ignore_index=True)
            recorded = recorded.sort_values(["config", "epoch"], ignore_index=True)
            write_file(settings.save, recorded.to_csv(index=False, lineterminator="\n"))
            last = curve.iloc[-1]
            tell(
                f"{recorded['config'].nunique()} of {settings.configs}: configuration "
                f"{last['config']} ends at {last['test_accuracy']:.2%} on the test images, "
                f"{last['averaged_test_accuracy']:.2%} averaged"
            )


def record(
    number: int, config: TrainConfig, *, epochs: int, images: int, data_dir: Path | None
) -> list[dict[str, Any]]:
    """Train one configuration and return its rows, one an epoch."""
    torch.set_num_threads(1)
    data = split(load_mnist(data_dir), holdout=True, images=images)
    tensors = SplitTensors.on(data, "cpu")
    # The test images are scored once, at the end: they take most of an evaluation's time.
    data = replace(data, test_images=data.test_images[:0], test_labels=data.test_labels[:0])
    # The average looks back over one epoch, however many steps that has.
    steps = math.ceil(images / config.batch_size)
    config = replace(config, ema_decay=1 - 1 / max(steps, 2))
    columns = {f"config_{name}": value for name, value in config.as_dict().items()}
    del columns["config_ema_decay"]  # both kinds of weights are recorded
    rows = []
    for result in train(config, data, epochs=epochs, seed=number):
        metrics = result.metrics
        raw = _score(raw_weights(result.state), result, tensors.val_images, tensors.val_labels)
        tested = averaged_tested = Score()
        if metrics.epoch == epochs:
            test = tensors.test_images, tensors.test_labels
            tested = _score(raw_weights(result.state), result, *test)
            averaged_tested = _score(result.weights, result, *test)
        row = {
            "config": number,
            "epoch": metrics.epoch,
            "train_loss": _rounded(metrics.train_loss),
            "val_accuracy": raw.accuracy,
            "val_loss": _rounded(raw.loss),
            "averaged_val_accuracy": metrics.val_accuracy,
            "averaged_val_loss": _rounded(metrics.val_loss),
            "test_accuracy": tested.accuracy,
            "averaged_test_accuracy": averaged_tested.accuracy,
            "diverged_step": metrics.diverged_step,
        }
        rows.append({**row, **columns})
    return rows


def _score(weights: bytes, result: EpochResult, images: Tensor, labels: Tensor) -> Score:
    """Score weights of an epoch, unless it diverged."""
    if result.metrics.diverged_step is not None:
        return Score()
    net = load_weights(weights)
    return evaluate(net, images, labels, backend(net, threads=1))


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
