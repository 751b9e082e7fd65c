"""MNIST as NumPy arrays, and the split that every training run sees.

Reading needs neither torch nor torchvision: with the four files in place the whole set is there
in a fraction of a second. `download` gets the files in the first place.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tune_mnist.errors import ConfigError, DataUnavailableError
from tune_mnist.host import cache_dir
from tune_mnist.locations import user_path
from tune_mnist.mnist.download import (
    MD5S,
    TEST_IMAGES,
    TEST_LABELS,
    DamagedError,
    fetch,
    read_checked,
)

Uint8s = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

HOLDOUT_SHARE = 12  # one in twelve training images is held out: 5,000 of the 60,000
SPLIT_SEED = 1998  # never changes: every val_* ever written was measured on this split


@dataclass(frozen=True)
class Mnist:
    """The data set as it was published, in its own order."""

    train_images: Uint8s  # [60000, 28, 28]
    train_labels: Uint8s  # [60000]
    test_images: Uint8s  # [10000, 28, 28]
    test_labels: Uint8s  # [10000]


@dataclass(frozen=True)
class Split:
    """What one training run sees."""

    train_images: Uint8s  # [N, 28, 28]
    train_labels: Uint8s  # [N]
    val_images: Uint8s  # [5000, 28, 28], or [0, 28, 28] without a holdout
    val_labels: Uint8s  # [5000], or [0]
    test_images: Uint8s  # [10000, 28, 28]
    test_labels: Uint8s  # [10000]


def default_data_dir() -> Path:
    """Return `TUNE_MNIST_DATA`, or `tune_mnist` in the user's cache folder: not one a project."""
    if chosen := os.environ.get("TUNE_MNIST_DATA"):
        return user_path(chosen)
    return cache_dir(holding="MNIST")


def load_mnist(data_dir: Path | None = None, say: Callable[[str], None] | None = None) -> Mnist:
    """Read MNIST from `data_dir`, or `default_data_dir()`; fetch what is missing or damaged.

    The folder holds `MNIST/raw`, as torchvision lays it out. `say` takes each line of progress,
    standard error unless given. Raise ConfigError if the folder would have to be written and
    cannot be, DataUnavailableError if every source failed.
    """
    folder = (default_data_dir() if data_dir is None else data_dir).absolute()
    try:
        return _read_mnist(folder)
    except DamagedError:
        fetch(folder, say or _say_to_stderr)
    return _read_mnist(folder)


def read_test_set(data_dir: Path | None = None) -> tuple[Uint8s, Uint8s]:
    """Return the test images and labels without fetching, or raise DataUnavailableError."""
    raw = (data_dir or default_data_dir()).absolute() / "MNIST" / "raw"
    try:
        return read_checked(raw, TEST_IMAGES), read_checked(raw, TEST_LABELS)
    except DamagedError as error:
        raise DataUnavailableError(
            f"MNIST's test images are not in {raw}: name their folder with --data-dir"
        ) from error


def _read_mnist(data_dir: Path) -> Mnist:
    raw = data_dir / "MNIST" / "raw"
    return Mnist(*(read_checked(raw, name) for name in MD5S))


def _say_to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def split(mnist: Mnist, *, holdout: bool, images: int | None = None) -> Split:
    """Divide `mnist` into what one run trains on, is selected by and is judged on.

    A holdout is a stratified 5,000 of the 60,000 training images, the same ones for every trial,
    seed and call, whatever `images` is. `images` limits training to so many, a fixed stratified
    choice; ConfigError is raised if there are not so many.
    """
    labels = mnist.train_labels
    val_count = len(labels) // HOLDOUT_SHARE if holdout else 0
    val = choose_stratified(labels, val_count)
    is_train = np.ones(len(labels), dtype=bool)
    is_train[val] = False
    train = np.flatnonzero(is_train)
    if images is not None:
        if not 1 <= images <= len(train):
            left = f" ({len(val):,} of {len(labels):,} are held out)" if holdout else ""
            raise ConfigError(f"images must be from 1 to {len(train):,}{left}, but got {images:,}")
        train = train[choose_stratified(labels[train], images)]
    return Split(
        train_images=mnist.train_images[train],
        train_labels=labels[train],
        val_images=mnist.train_images[val],
        val_labels=labels[val],
        test_images=mnist.test_images,
        test_labels=mnist.test_labels,
    )


def choose_stratified(labels: Uint8s, count: int) -> Indices:
    """Return `count` indices into `labels` [N], ascending, with the classes in proportion.

    A class gets its exact share rounded down, and the largest remainders get what is left over.
    """
    sizes = np.bincount(labels, minlength=10)
    quotas = sizes * count // len(labels)
    remainders = sizes * count % len(labels)
    largest_first = np.argsort(-remainders, kind="stable")
    quotas[largest_first[: count - quotas.sum()]] += 1
    # RandomState, not default_rng: NumPy promises its stream for good (NEP 19).
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    chosen = [order[labels[order] == digit][:quota] for digit, quota in enumerate(quotas)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
