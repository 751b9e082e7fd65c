"""The textbook recipe, as torch's MNIST example and Ray's have it: the benchmarks' yardstick.

DataLoaders, torch's modules, optimizers and schedules, all as they come.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.images import PIXEL_MEAN, PIXEL_STD
from tune_mnist.mnist.net import Net


def textbook_loader(
    data_dir: Path,
    *,
    train: bool,
    batch_size: int,
    shuffle: bool = False,
    chosen: Sequence[int] | None = None,
) -> DataLoader[Any]:
    """Return a DataLoader of torchvision's MNIST, or of its images `chosen`, without workers."""
    normalize = transforms.Normalize((PIXEL_MEAN,), (PIXEL_STD,))
    transform = transforms.Compose([transforms.ToTensor(), normalize])
    dataset: Dataset[Any] = datasets.MNIST(data_dir, train=train, transform=transform)
    if chosen is not None:
        dataset = Subset(dataset, chosen)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def train_textbook(
    config: TrainConfig,
    data_dir: Path,
    train: Sequence[int],
    val: Sequence[int],
    *,
    epochs: int,
    tests: bool,
) -> Iterator[float]:
    """Train on images `train` and yield the accuracy on images `val` after every epoch.

    With `tests` the test images are evaluated as well, as ours always are. One thread: as many
    trials as there are cores run at once.
    """
    torch.set_num_threads(1)
    train_loader = textbook_loader(
        data_dir, train=True, batch_size=config.batch_size, shuffle=True, chosen=train
    )
    val_loader = textbook_loader(data_dir, train=True, batch_size=1000, chosen=val)
    test_loader = textbook_loader(data_dir, train=False, batch_size=1000) if tests else None
    net = Net(config.dropout)
    optimizer = build_optimizer(net, config)
    schedule = build_schedule(optimizer, config, epochs, len(train_loader))
    for _ in range(epochs):
        net.train()
        for images, labels in train_loader:
            textbook_step(net, optimizer, images, labels)
            schedule.step()
        if test_loader is not None:
            evaluate_textbook(net, test_loader)
        yield evaluate_textbook(net, val_loader)


def textbook_step(net: Net, optimizer: Optimizer, images: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad()
    F.nll_loss(net(images), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def evaluate_textbook(net: Net, loader: Iterable[Any]) -> float:
    """Return the net's accuracy and leave it in evaluation mode."""
    net.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            correct += int((net(images).argmax(1) == labels).sum().item())
            total += len(labels)
    return correct / total


def build_optimizer(net: nn.Module, config: TrainConfig) -> Optimizer:
    given: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            net.parameters(), momentum=config.momentum, nesterov=config.nesterov, **given
        )
    return torch.optim.AdamW(net.parameters(), betas=(config.beta1, config.beta2), **given)


def build_schedule(
    optimizer: Optimizer, config: TrainConfig, epochs: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """Return a schedule that is moved on after every step."""
    steps = epochs * steps_per_epoch
    match config.schedule:
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, steps)
        case "onecycle":
            peak = config.peak_position
            return lr_scheduler.OneCycleLR(
                optimizer, config.lr, steps, pct_start=peak, cycle_momentum=False
            )
        case "step":
            length = config.step_every * steps_per_epoch
            return lr_scheduler.StepLR(optimizer, length, config.step_factor)
        case "constant":
            return lr_scheduler.ConstantLR(optimizer, 1.0)
