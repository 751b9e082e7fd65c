"""An epoch, whatever it is computed on: the random numbers it starts from, what it leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.evaluation import Score
from tune_mnist.mnist.net import Net

StepListener = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Epoch:
    """What training and evaluating for an epoch left, on the CPU."""

    losses: Tensor  # of the batches [steps], fewer where the epoch was broken off
    val: Score
    test: Score
    seconds: float  # training time, without the evaluation
    evaluation_seconds: float
    state: dict[str, Any]  # `net`, `optimizer`, `average` (None without one): their state_dicts


def draw_seeds(seed: int, epoch: int) -> tuple[int, int]:
    """Derive two independent seeds, 63 bits each, from a run's seed and an epoch."""
    first, second = np.random.SeedSequence([seed, epoch]).generate_state(2, np.uint64) >> 1
    return int(first), int(second)


def draw_order(images: int, seed: int) -> Tensor:
    """Draw the order of an epoch's images, int64 [images]; on the CPU, so the same everywhere."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(seed))


def draw_net(config: TrainConfig, seed: int) -> Net:
    """Draw a run's fresh net without touching the process's random numbers."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed GPUs for good
        torch.default_generator.manual_seed(draw_seeds(seed, epoch=0)[0])
        net = Net(config.dropout)
    return net.to(memory_format=torch.channels_last)
