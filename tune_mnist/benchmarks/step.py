"""`bench step`: what one training step costs on one core, against the textbook recipe.

Every variant is a process of its own, as allocator and threads belong to a process. The processes
take turns of a few steps each, so that whatever else the machine does meets all of them.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.settings import StepSettings
from tune_mnist.benchmarks.textbook import evaluate_textbook, textbook_loader, textbook_step
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist import training
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.cpu import backend, keep_freed_memory
from tune_mnist.mnist.data import Split, default_data_dir, load_mnist, split
from tune_mnist.mnist.forward import evaluate
from tune_mnist.mnist.images import SplitTensors, normalised, scaled
from tune_mnist.mnist.net import Net
from tune_mnist.runs.formatting import count

VARIANTS = {
    "textbook": "DataLoader, ToTensor, Normalize, torch's modules",
    "tensors": "the same net, images in memory as tensors",
    "channels_last": "and channels last",
    "kept_memory": "and freed memory kept by the process",
    "no_numba": "ours without numba",
    "default_malloc": "ours with the C library's defaults",
    "ours": "what a trial runs, from the batch's indices to the weights",
    "conv_only": "the convolutions and the pool alone, forward and backward",
}
EVALUATIONS = ("evaluation", "textbook_evaluation")  # one pass over 15,000 images
NEEDED = ("textbook", "ours", "conv_only")
STEPS_PER_EPOCH = 430  # 55,000 images by 128
WARM_UP = 5  # steps; one pass of an evaluation
BATCH = 128

Listener = Callable[[], None]


def step(settings: StepSettings) -> None:
    data_dir = settings.data_dir or default_data_dir()
    load_mnist(data_dir)  # fetched once and not by each of the processes
    variants = NEEDED if settings.quick else tuple(VARIANTS)
    evaluations = EVALUATIONS[:1] if settings.quick else EVALUATIONS
    rounds = min(settings.rounds, 7) if settings.quick else settings.rounds
    tell(
        f"one thread, batches of 128, {count(rounds, 'turn')} of {count(settings.steps, 'step')} "
        "for each variant, one after the other"
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # read as a process starts
    measured = Measurements("step")
    with ExitStack() as stack:
        measure = {
            variant: stack.enter_context(worker(variant, data_dir))
            for variant in (*variants, *evaluations)
        }
        for turn in range(rounds):
            for variant in variants:
                found = measure[variant](settings.steps)
                measured.add(variant, "step_ms", found["ms"])
                measured.add(variant, "page_faults", found["faults"])
            if turn < max(1, rounds // 4):
                for variant in evaluations:
                    found = measure[variant](1)
                    measured.add(variant, "evaluation_s", found["ms"] / 1e3)
    for variant in variants:
        tell(f"{variant:<16} {VARIANTS[variant]}")
    measured.finish(_keys(measured), settings.save)


def _keys(measured: Measurements) -> dict[str, float]:
    textbook, ours, conv_only = measured.medians(NEEDED, "step_ms").values()
    evaluation = measured.median("evaluation", "evaluation_s")
    return {
        "textbook_ms": textbook,
        "ours_ms": ours,
        "conv_only_ms": conv_only,
        "speedup": textbook / ours,
        "over_conv": ours / conv_only,
        "evaluation_s": evaluation,  # 15,000 images
        "textbook_evaluation_s": measured.median("textbook_evaluation", "evaluation_s"),
        "evaluation_share": evaluation / (evaluation + STEPS_PER_EPOCH * ours / 1e3),
        "n": len(measured.values("ours", "step_ms")),
    }


@contextmanager
def worker(variant: str, data_dir: Path) -> Iterator[Callable[[int], dict[str, float]]]:
    """Start a process of one variant; yields a function that takes steps and returns the mean.

    That function raises TuneMnistError if the process has ended.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=step_forever, args=(variant, data_dir, there), daemon=True)
    process.start()
    there.close()

    def measure(steps: int) -> dict[str, float]:
        try:
            here.send(steps)
            found: dict[str, float] = here.recv()
        except (OSError, EOFError) as error:
            message = f"the process of {variant} ended; its message is above"
            raise TuneMnistError(message) from error
        return found

    try:
        yield measure
    finally:
        process.kill()
        process.join()


def turns(warm_up: int, asked: Connection) -> Iterator[None]:
    """Yield before each step; time as many as are asked for, and answer with the mean of one."""
    yield from repeat(None, warm_up)
    while True:
        steps = asked.recv()
        faults, began = _page_faults(), time.perf_counter()
        yield from repeat(None, steps)
        seconds = time.perf_counter() - began
        faults = _page_faults() - faults
        asked.send({"ms": seconds * 1e3 / steps, "faults": faults / steps})


def step_forever(variant: str, data_dir: Path, asked: Connection) -> None:
    """Take steps of a variant, or passes over 15,000 images, as they are asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    turn = turns(1 if variant.endswith("evaluation") else WARM_UP, asked)
    next(turn)
    on_step = partial(next, turn)
    if variant.startswith("textbook"):
        return (_textbook if variant == "textbook" else _textbook_evaluation)(data_dir, on_step)
    data = split(load_mnist(data_dir), holdout=True)
    if variant not in ("tensors", "channels_last", "default_malloc"):
        keep_freed_memory()
    match variant:
        case "tensors":
            return _modules(data, torch.contiguous_format, on_step)
        case "channels_last" | "kept_memory":
            return _modules(data, torch.channels_last, on_step)
        case "ours" | "no_numba" | "default_malloc":
            return _ours(data, on_step, variant)
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
            textbook_step(net, optimizer, images, labels)
            on_step()


def _textbook_evaluation(data_dir: Path, on_step: Listener) -> None:
    """One and a half times torch's test set, as ours has 5,000 images more; batches as there."""
    chosen = [image % 10_000 for image in range(15_000)]
    loader = textbook_loader(data_dir, train=False, batch_size=1000, chosen=chosen)
    net = Net(0.1)
    while True:
        evaluate_textbook(net, loader)
        on_step()


def _modules(data: Split, layout: torch.memory_format, on_step: Listener) -> None:
    """Torch's modules on a batch that is ready in memory."""
    net = Net(0.1).train().to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images = normalised(scaled(torch.from_numpy(data.train_images[:BATCH])))
    images = images.contiguous(memory_format=layout)
    labels = torch.from_numpy(data.train_labels[:BATCH]).long()
    while True:
        textbook_step(net, optimizer, images, labels)
        on_step()


def _ours(data: Split, on_step: Listener, variant: str) -> None:
    """What every trial runs, or runs without something."""
    if variant == "no_numba":
        sys.modules["numba"] = None  # type: ignore[assignment]  # so that no import finds it
    if variant == "default_malloc":
        vars(training)["keep_freed_memory"] = lambda: False
    for _ in training.train(
        TrainConfig(), data, epochs=1_000, seed=0, on_step=lambda number, loss: on_step()
    ):
        pass


def _convolutions(data: Split, on_step: Listener) -> None:
    """Torch's own convolutions and pool, forward and backward."""
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
    chosen = backend(net, threads=1)
    while True:
        evaluate(net, tensors.val_images, tensors.val_labels, chosen)
        evaluate(net, tensors.test_images, tensors.test_labels, chosen)
        on_step()


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
