"""The textbook recipe, as torch's MNIST example and Ray's have it: the benchmarks' yardstick."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from tune_mnist.mnist.images import PIXEL_MEAN, PIXEL_STD
from tune_mnist.mnist.net import Net

Loader = DataLoader[Any]


def textbook_dataset(data_dir: Path, *, train: bool) -> Dataset[Any]:
    """Return torchvision's MNIST with the usual transforms."""
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((PIXEL_MEAN,), (PIXEL_STD,))]
    )
    dataset: Dataset[Any] = datasets.MNIST(data_dir, train=train, transform=transform)
    return dataset


def textbook_loader(
    data_dir: Path,
    *,
    train: bool,
    batch_size: int,
    shuffle: bool = False,
    chosen: Sequence[int] | None = None,
    images: int | None = None,
) -> Loader:
    """Return a DataLoader as it comes, without workers.

    Args:
        data_dir: the folder that holds MNIST/raw.
        train: the training images, not the test images.
        batch_size: images a batch.
        shuffle: in another order each time.
        chosen: only the images with these indices.
        images: so many, from the start again where there are fewer.
    """
    dataset = textbook_dataset(data_dir, train=train)
    if chosen is not None:
        dataset = Subset(dataset, chosen)
    if images is not None:
        dataset = Subset(ConcatDataset([dataset, dataset]), range(images))
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def evaluate_textbook(net: Net, loader: Iterable[Any]) -> float:
    """Return the net's accuracy, in evaluation mode, which it is left in."""
    net.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            correct += int((net(images).argmax(1) == labels).sum().item())
            total += len(labels)
    return correct / total
