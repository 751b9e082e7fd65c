"""The training steps that `bench step` compares: one variant, in a process of its own.

Reads a number of steps a line from stdin and writes what a step of so many took, as JSON.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from tune_mnist.benchmarks.textbook import evaluate_textbook, textbook_loader
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.cpu import loops as kernels
from tune_mnist.mnist.data import Split, default_data_dir, load_mnist, split
from tune_mnist.mnist.evaluation import evaluate
from tune_mnist.mnist.fused import keep_freed_memory
from tune_mnist.mnist.images import SplitTensors, normalised, scaled
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.training import train

WARM_UP = 5  # steps; one pass of an evaluation
BATCH = 128

Listener = Callable[[], None]


class Turns:
    """Listens to steps: waits for a turn, lets so many pass, says what one took."""

    def __init__(self, warm_up: int) -> None:
        self._left, self._steps = warm_up, 0
        self._began, self._faults = 0.0, 0  # when and after how many the turn began

    def __call__(self) -> None:
        """Take note of a step, and wait after a turn's last one; exits when nobody asks on."""
        self._left -= 1
        if self._left > 0:
            return
        if self._steps:
            seconds = time.perf_counter() - self._began
            found = {
                "ms": seconds * 1e3 / self._steps,
                "faults": (_page_faults() - self._faults) / self._steps,
            }
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        self._left = self._steps = int(line)
        self._faults = _page_faults()
        self._began = time.perf_counter()


def step_for_ever(variant: str, data_dir: Path) -> None:
    """Take steps of a variant (or passes over 15,000 images) until nobody asks for more.

    Raises:
        ValueError: there is no such variant.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_step = Turns(1 if variant.endswith("evaluation") else WARM_UP)
    if variant == "textbook":
        return _textbook(data_dir, on_step)
    if variant == "textbook_evaluation":
        return _textbook_evaluation(data_dir, on_step)
    data = split(load_mnist(data_dir), holdout=True)
    if variant not in ("tensors", "channels_last", "default_malloc"):
        keep_freed_memory()
    kernels.COMPILED &= variant != "no_numba"
    match variant:
        case "tensors":
            return _modules(data, torch.contiguous_format, on_step)
        case "channels_last" | "kept_memory":
            return _modules(data, torch.channels_last, on_step)
        case "ours" | "no_numba" | "default_malloc":
            return _ours(data, on_step)
        case "conv_only":
            return _convolutions(data, on_step)
        case "evaluation":
            return _evaluation(data, on_step)
    raise ValueError(f"no variant {variant!r}")


def _textbook(data_dir: Path, on_step: Listener) -> None:
    """As in torch's own MNIST example."""
    net = Net(0.1).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loader = textbook_loader(data_dir, train=True, batch_size=BATCH, shuffle=True)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            F.nll_loss(net(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            on_step()


def _textbook_evaluation(data_dir: Path, on_step: Listener) -> None:
    """One and a half times torch's test set, as ours has 5,000 images more; batches as there."""
    net = Net(0.1)
    loader = textbook_loader(data_dir, train=False, batch_size=1000, images=15_000)
    while True:
        evaluate_textbook(net, loader)
        on_step()


def _modules(data: Split, layout: torch.memory_format, on_step: Listener) -> None:
    """Torch's modules on a batch that lies ready."""
    net = Net(0.1).train().to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images = normalised(scaled(torch.from_numpy(data.train_images[:BATCH])))
    images = images.contiguous(memory_format=layout)
    labels = torch.from_numpy(data.train_labels[:BATCH]).long()
    while True:
        optimizer.zero_grad()
        F.nll_loss(net(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        on_step()


def _ours(data: Split, on_step: Listener) -> None:
    """What every trial runs."""
    for _ in train(
        TrainConfig(), data, epochs=1_000, seed=0, on_step=lambda number, loss: on_step()
    ):
        pass


def _convolutions(data: Split, on_step: Listener) -> None:
    """The convolutions and the pool as torch has them, forward and backward."""
    net = Net().to(memory_format=torch.channels_last)
    layers = [layer for layer in net.features if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    images = normalised(scaled(torch.from_numpy(data.train_images[:BATCH])))
    top = torch.randn(BATCH, 32, 5, 5).contiguous(memory_format=torch.channels_last)
    while True:
        h = images
        for layer in layers:
            h = layer(h)
        torch.autograd.grad(h, parameters, top)
        on_step()


def _evaluation(data: Split, on_step: Listener) -> None:
    tensors = SplitTensors.on(data, "cpu")
    net = Net().to(memory_format=torch.channels_last)
    while True:
        evaluate(net, tensors.val_images, tensors.val_labels)
        evaluate(net, tensors.test_images, tensors.test_labels)
        on_step()


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    _, chosen, *folder = sys.argv
    step_for_ever(chosen, Path(folder[0]) if folder else default_data_dir())
