"""Images as tensors on a device, and the random distortion of a batch of them.

Distortion runs where the batch is: rotation, scaling, shift and elastic bending in one bilinear
look-up, each image by its own draws.
"""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Split

# Mean and standard deviation of the 60,000 training images' pixels, in [0, 1].
PIXEL_MEAN = 0.1307
PIXEL_STD = 0.3081

ELASTIC_SMOOTHNESS = 4.0  # pixels: standard deviation of the Gaussian that smooths displacements


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
        return self.train_images.device

    @classmethod
    def on(cls, split: Split, device: str, *, copy: bool = False) -> Self:
        """Put a split, or a copy of it, on a device."""

        def put(name: str, array: npt.NDArray[np.uint8]) -> Tensor:
            dtype = torch.int64 if name.endswith("labels") else torch.uint8
            return _tensor(array).to(device, dtype, copy=copy)

        return cls(**{name: put(name, array) for name, array in vars(split).items()})

    def fits(self, split: Split) -> bool:
        return all(getattr(self, name).shape == array.shape for name, array in vars(split).items())

    def fill(self, split: Split) -> None:
        """Overwrite what these tensors hold with a split; they stay where they are."""
        for name, array in vars(split).items():
            getattr(self, name).copy_(_tensor(array))


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


class Amounts(NamedTuple):
    """How far images are distorted: at most, but for `bend`, which is a mean."""

    turn: float | Tensor  # radians, either way
    zoom: float | Tensor  # change of scale, either way
    shift: float | Tensor  # fraction of the side, along each axis, either way
    bend: float | Tensor  # fraction of the side that a pixel is displaced by, root mean square


def amounts_of(config: TrainConfig) -> Amounts:
    return Amounts(math.radians(config.rotation), config.scale, config.shift, config.elastic)


def augments(config: TrainConfig, *, done: int, epochs: int) -> bool:
    """Return True if the epoch after `done` of a run's `epochs` distorts its training images.

    The last epochs may see the images as they are, which are what the net is judged on: distorted
    ones are another distribution (He et al., arXiv 1909.09148).
    """
    return any(amounts_of(config)) and done < round(config.augmented_part * epochs)


def distort(
    images: Tensor, amounts: Amounts, generator: torch.Generator, *, bends: bool
) -> Tensor:
    """Rotate and scale each image about its centre, shift it and bend it, by its own draws.

    Images are float32 [B, 1, S, S], with a background of 0, which fills what moves in. Amounts
    that are scalar tensors are read by the device alone. Without `bends` nothing is drawn for it.
    """
    draws = _uniform((4, len(images)), images.device, generator)
    limits = (amounts.turn, amounts.zoom, amounts.shift, amounts.shift)
    angle, scale, right, down = (draw * limit for draw, limit in zip(draws, limits, strict=True))
    sources = affine_sources(images, angle=angle, scale=1 + scale, right=right, down=down)
    if bends:
        noise = _uniform((len(images), 2, *images.shape[2:]), images.device, generator)
        sources = sources + smooth(noise) * (2 * amounts.bend)  # the image's side is 2
    return sample(images, sources)


def _uniform(size: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw numbers from -1 to 1."""
    return torch.rand(size, generator=generator, device=device).mul_(2).sub_(1)


def affine_sources(
    images: Tensor, *, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor
) -> Tensor:
    """Return where pixels come from that rotate and scale about the centre and then shift.

    All arguments are [B]: radians counter-clockwise, a factor, and fractions of the side. The
    result is x and y of every pixel's source, [B, 2, H, W], in an image that spans [-1, 1].
    """
    # The matrix looks up where a pixel comes from, so it is the inverse of what is asked for:
    # take the shift back, then turn and scale back. The image spans [-1, 1]: its side is 2.
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    back_x = -2 * (cos * right - sin * down)
    back_y = -2 * (sin * right + cos * down)
    matrices = torch.stack((cos, -sin, back_x, sin, cos, back_y), dim=1)
    height, width = images.shape[2:]
    # One product for the whole batch; F.affine_grid does one an image and takes 4 times as long.
    sources = matrices.view(-1, 3) @ _pixel_centres(height, width, images.device)
    return sources.view(-1, 2, height, width)


def smooth(noise: Tensor) -> Tensor:
    """Turn uniform noise from -1 to 1, [..., S, S], into smooth fields with a variance of 1.

    Every row and column is filtered by a Gaussian of 4 pixels, as in Simard et al., "Best
    practices for convolutional neural networks applied to visual document analysis" (2003), whose
    own strength, 34, is 0.05 as a root mean square displacement by the width. Divided by its
    norm everywhere, the filter displaces as much at the edges as in the middle.
    """
    # A uniform number's variance is a third.
    bells = _gaussians(noise.shape[-1], noise.device)
    return bells @ noise @ bells.T * math.sqrt(3)


def sample(images: Tensor, sources: Tensor) -> Tensor:
    """Look pixels up at their sources, as `affine_sources` has them, bilinearly; outside is 0."""
    return F.grid_sample(images, sources.permute(0, 2, 3, 1), align_corners=False)


@cache
def _pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Return x, y and 1 of every pixel's centre, [3, H * W], in an image that spans [-1, 1]."""
    x = (2 * torch.arange(width, device=device) + 1) / width - 1
    y = (2 * torch.arange(height, device=device) + 1) / height - 1
    xs, ys = x.repeat(height), y.repeat_interleave(width)
    return torch.stack((xs, ys, torch.ones_like(xs)))


@cache
def _gaussians(size: int, device: torch.device) -> Tensor:
    """Return a Gaussian about each of so many pixels in a row, each of norm 1, [size, size]."""
    place = torch.arange(size, device=device)
    bells = torch.exp(-((place[:, None] - place) ** 2) / (2 * ELASTIC_SMOOTHNESS**2))
    return F.normalize(bells, dim=1)
