"""A trial as the textbooks have it: DataLoaders, torch's modules, optimizers and schedules."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tune_mnist.benchmarks.peer_task import CHOSEN, Task
from tune_mnist.benchmarks.textbook import evaluate_textbook, textbook_loader
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net


def train_textbook(task: Task, values: Mapping[str, Any]) -> Iterator[float]:
    """Train on the task's images and yield the validation accuracy after every epoch.

    One thread: as many trials as there are cores run at once. The images are those that ours
    trains on and validates with. The test set is left alone, which is less work than ours does,
    unless the task asks for it.
    """
    torch.set_num_threads(1)
    config = TrainConfig.from_mapping(values)
    data_dir = Path(task.data_dir)
    train, val = (np.load(Path(task.folder) / f"{name}.npy").tolist() for name in CHOSEN)
    train_loader = textbook_loader(
        data_dir, train=True, batch_size=config.batch_size, shuffle=True, chosen=train
    )
    val_loader = textbook_loader(data_dir, train=True, batch_size=1000, chosen=val)
    test_loader = textbook_loader(data_dir, train=False, batch_size=1000) if task.tests else None
    net = Net(config.dropout)
    optimizer = build_optimizer(net, config)
    schedule = build_schedule(optimizer, config, task.epochs, len(train_loader))
    for _ in range(task.epochs):
        net.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            F.nll_loss(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if test_loader is not None:
            evaluate_textbook(net, test_loader)
        yield evaluate_textbook(net, val_loader)


def build_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build torch's optimizer as it comes."""
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            net.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=decay,
        )
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(net.parameters(), lr=config.lr, betas=betas, weight_decay=decay)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, epochs: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Build torch's schedule, which is moved on after every step."""
    schedules = torch.optim.lr_scheduler
    match config.schedule:
        case "cosine":
            return schedules.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
        case "onecycle":
            return schedules.OneCycleLR(
                optimizer,
                max_lr=config.lr,
                total_steps=epochs * steps_per_epoch,
                pct_start=config.peak_position,
                cycle_momentum=False,
            )
        case "step":
            return schedules.StepLR(
                optimizer, config.step_every * steps_per_epoch, config.step_factor
            )
        case "constant":
            return schedules.ConstantLR(optimizer, 1.0)
