"""The split as tensors on a device, the form in which training slices it."""

import warnings
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tune_mnist.mnist.data import Split

# Mean and standard deviation of the 60,000 training images' pixels, in [0, 1].
PIXEL_MEAN = 0.1307
PIXEL_STD = 0.3081


@dataclass(frozen=True)
class SplitTensors:
    """A split on a device; on the CPU its images are the split's own, not a copy."""

    train_images: Tensor  # uint8 [N, 28, 28]
    train_labels: Tensor  # int64 [N]
    val_images: Tensor  # uint8 [V, 28, 28]; V: 5,000, or 0 without a holdout
    val_labels: Tensor  # int64 [V]
    test_images: Tensor  # uint8 [10000, 28, 28]
    test_labels: Tensor  # int64 [10000]

    @property
    def device(self) -> torch.device:
        """The device that the tensors are on."""
        return self.train_images.device

    @classmethod
    def on(cls, split: Split, device: str) -> Self:
        """Put a split on a device."""
        return cls(
            **{
                name: _tensor(array).to(device, _dtype(name))
                for name, array in vars(split).items()
            }
        )

    @classmethod
    def room_for(cls, split: Split, device: str) -> Self:
        """Return tensors on a device, all zeros, that a split as large can be put into."""
        return cls(
            **{
                name: torch.zeros(array.shape, dtype=_dtype(name), device=device)
                for name, array in vars(split).items()
            }
        )

    def fits(self, split: Split) -> bool:
        """Say whether a split is as large as what these tensors hold."""
        return all(getattr(self, name).shape == array.shape for name, array in vars(split).items())

    def fill(self, split: Split) -> None:
        """Put a split in the place of what these tensors hold, which stay where they are."""
        for name, array in vars(split).items():
            getattr(self, name).copy_(_tensor(array))


def _dtype(name: str) -> torch.dtype:
    return torch.int64 if name.endswith("labels") else torch.uint8


def _tensor(array: npt.NDArray[np.uint8]) -> Tensor:
    with warnings.catch_warnings():
        # Arrays from shared memory are read-only and torch has no such tensors; nothing writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)


def scaled(images: Tensor) -> Tensor:
    """Turn bytes [B, 28, 28] into float32 [B, 1, 28, 28] from 0 (background) to 1."""
    return images.to(torch.float32).unsqueeze(1).div_(255)


def normalised(images: Tensor) -> Tensor:
    """Shift and scale pixels in [0, 1] to mean 0 and standard deviation 1, in place."""
    return images.sub_(PIXEL_MEAN).div_(PIXEL_STD)
