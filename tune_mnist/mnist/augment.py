"""Random affine distortions of a batch of images, on the device the batch is on."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tune_mnist.mnist.config import TrainConfig


def augments(config: TrainConfig, *, done: int, epochs: int) -> bool:
    """Say whether the epoch after so many of a run distorts its training images.

    The last epochs may see the images as they are, which are what the net is judged on: distorted
    ones are another distribution (He et al., arXiv 1909.09148).
    """
    distorts = config.rotation > 0 or config.shift > 0 or config.scale > 0
    return distorts and done < round(config.augmented_part * epochs)


def affine_limits(config: TrainConfig) -> tuple[float, float, float]:
    """Return the largest turn (radians), change of scale and shift (fraction of the side)."""
    return math.radians(config.rotation), config.scale, config.shift


def random_affine(
    images: Tensor,
    limits: Sequence[float] | Sequence[Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Rotate and scale each image about its centre, then shift it, by its own random amounts.

    Args:
        images: float32 [B, 1, H, W] with a background of 0, which fills what moves in.
        limits: the largest amounts, as `affine_limits` has them; or scalar tensors on the images'
            device, whose values nobody waits for.
        generator: draws the amounts, uniformly; on the images' device.

    Returns:
        Images of the same shape, sampled bilinearly.
    """
    turn, zoom, shift = limits
    size = (4, images.shape[0])
    draws = torch.rand(size, generator=generator, device=images.device).mul_(2).sub_(1)
    angle, scale, right, down = (
        draw * limit for draw, limit in zip(draws, (turn, zoom, shift, shift), strict=True)
    )
    return affine(images, angle=angle, scale=1 + scale, right=right, down=down)


def affine(images: Tensor, *, angle: Tensor, scale: Tensor, right: Tensor, down: Tensor) -> Tensor:
    """Rotate and scale each image about its centre, then shift it.

    Args:
        images: float32 [B, 1, H, W].
        angle: radians counter-clockwise, [B].
        scale: what lengths are multiplied by, [B].
        right: fraction of the width, [B].
        down: fraction of the height, [B].
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
    grid = sources.view(-1, 2, height, width).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)


@cache
def _pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Return x, y and 1 of every pixel's centre, [3, H * W], in an image that spans [-1, 1]."""
    x = (2 * torch.arange(width, device=device) + 1) / width - 1
    y = (2 * torch.arange(height, device=device) + 1) / height - 1
    xs, ys = x.repeat(height), y.repeat_interleave(width)
    return torch.stack((xs, ys, torch.ones_like(xs)))
