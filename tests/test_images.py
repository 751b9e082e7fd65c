import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.images import (
    SplitTensors,
    affine_sources,
    amounts_of,
    augments,
    distort,
    normalised,
    sample,
    scaled,
    smooth,
)


@pytest.mark.filterwarnings("error")
def test_a_splits_read_only_images_are_shared_without_a_warning_and_labels_fit_the_loss(
    small_mnist: Mnist,
) -> None:
    found = split(small_mnist, holdout=True)
    # As out of shared memory.
    data = Split(**{name: np.broadcast_to(each, each.shape) for name, each in vars(found).items()})
    tensors = SplitTensors.on(data, "cpu")
    for name, array in vars(data).items():
        tensor = getattr(tensors, name)
        np.testing.assert_array_equal(tensor.numpy(), array)
        if name.endswith("images"):
            assert tensor.data_ptr() == array.ctypes.data
        else:
            assert tensor.dtype == torch.int64
    assert tensors.device == torch.device("cpu")
    without = SplitTensors.on(split(small_mnist, holdout=False), "cpu")
    assert len(without.val_labels) == len(without.val_images) == 0


def test_pixels_go_to_zero_and_one_and_are_normalised_to_mean_0_and_deviation_1(
    mnist: Mnist,
) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 28, 3)
    pixels = scaled(images)
    assert pixels.shape == (2, 1, 28, 3)
    torch.testing.assert_close(pixels[0, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    assert images[0, 0].tolist() == [0, 51, 255]

    whole = normalised(scaled(torch.from_numpy(mnist.train_images)))
    assert abs(whole.mean().item()) < 1e-3
    assert abs(whole.std().item() - 1) < 1e-3


def test_a_split_takes_the_place_of_one_as_large(small_mnist: Mnist) -> None:
    first, second = (
        replace(split(small_mnist, holdout=True, images=20), test_labels=labels)
        for labels in (small_mnist.test_labels, small_mnist.test_labels[::-1].copy())
    )
    room = SplitTensors.on(first, "cpu", copy=True)
    images = room.train_images
    assert images.data_ptr() != first.train_images.ctypes.data
    room.fill(second)
    assert room.train_images is images
    for name, array in vars(second).items():
        assert getattr(room, name).tolist() == array.tolist()
    assert room.fits(first)
    assert not room.fits(split(small_mnist, holdout=True, images=30))


@pytest.fixture
def images(mnist: Mnist) -> Tensor:
    return scaled(torch.from_numpy(mnist.train_images[:64]))


def move(images: Tensor, **amounts: float) -> Tensor:
    """Move all images by the same amounts, the angle in degrees."""
    asked = {"angle": 0.0, "scale": 1.0, "right": 0.0, "down": 0.0} | amounts
    asked["angle"] = math.radians(asked["angle"])
    each = {name: torch.full((len(images),), amount) for name, amount in asked.items()}
    return sample(images, affine_sources(images, **each))


def distorted(images: Tensor, amounts: Mapping[str, float], seed: int = 3) -> Tensor:
    config = TrainConfig.from_mapping(amounts)
    draws = torch.Generator().manual_seed(seed)
    return distort(images, amounts_of(config), draws, bends=config.elastic > 0)


@pytest.mark.parametrize(
    ("part", "epochs", "distorted"),
    [(1, 20, 20), (0.8, 20, 16), (0.5, 5, 2), (0.01, 20, 0), (0.99, 20, 20)],
)
@pytest.mark.parametrize("name", ["rotation", "shift", "scale", "elastic"])
def test_amounts_above_zero_distort_but_the_last_epochs_see_the_images_as_they_are(
    name: str, part: float, epochs: int, distorted: int
) -> None:
    config = TrainConfig.from_mapping({name: 0.1, "augmented_part": part})
    found = [augments(config, done=done, epochs=epochs) for done in range(epochs)]
    assert found == [True] * distorted + [False] * (epochs - distorted)
    assert not augments(TrainConfig(augmented_part=part), done=0, epochs=epochs)


@pytest.mark.parametrize(
    ("quarters", "right", "down"),
    [(0, 3, 2), (1, 0, 0), (1, 3, 0)],
    ids=["shift", "turn", "turn-then-shift"],
)
def test_turns_are_counter_clockwise_then_shifts_go_right_and_down_over_background(
    images: Tensor, quarters: int, right: int, down: int
) -> None:
    turned = torch.rot90(images, quarters, dims=(2, 3))
    expected = functional.pad(turned, (right, 0, down, 0))[:, :, :28, :28]
    found = move(images, angle=90 * quarters, right=right / 28, down=down / 28)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_scaling_by_two_doubles_lengths_about_the_centre() -> None:
    image, expected = torch.zeros(2, 1, 1, 28, 28)
    image[..., 10:18, 12:16] = 1  # 8 high, 4 wide, in the middle
    expected[..., 6:22, 10:18] = 1
    assert torch.equal((move(image, scale=2) > 0.5).float(), expected)


@pytest.mark.parametrize("amounts", [{"rotation": 30}, {"elastic": 0.05}, {}])
def test_a_seed_distorts_each_image_by_amounts_of_its_own(
    images: Tensor, amounts: dict[str, float]
) -> None:
    same = images[:1].expand(8, -1, -1, -1)
    found, again, other = (distorted(same, amounts, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(found, again)
    if amounts:
        assert not torch.equal(found, other)
        assert len({tuple(image.flatten().tolist()) for image in found}) == 8
    else:
        torch.testing.assert_close(found, same, rtol=0, atol=1e-5)


def dot(row: int, column: int) -> Tensor:
    """2,000 blobs around one pixel, wide enough to survive resampling."""
    image = torch.zeros(1, 1, 28, 28)
    image[..., row - 1 : row + 2, column - 1 : column + 2] = 1
    return image.expand(2000, -1, -1, -1)


def centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the centres of mass, in pixels from the middle of the image."""
    place = torch.arange(28) - 13.5
    mass = images.sum(dim=(1, 2, 3))
    across = (images.sum(dim=(1, 2)) * place).sum(1) / mass
    along = (images.sum(dim=(1, 3)) * place).sum(1) / mass
    return across, along


def test_amounts_stay_within_their_bounds_and_reach_near_them() -> None:
    for moved in centres(distorted(dot(14, 14), {"shift": 0.2})):
        assert 0.98 * 5.6 < (moved - 0.5).abs().max() < 5.6 + 0.01
        assert (moved - 0.5).min() < 0 < (moved - 0.5).max()

    right_of_middle = dot(14, 22)
    x, y = centres(distorted(right_of_middle, {"rotation": 30}))
    start = math.degrees(math.atan2(-0.5, 8.5))
    angles = torch.rad2deg(torch.atan2(-y, x)) - start  # y points down
    assert 29 < angles.abs().max() < 30.3
    assert angles.min() < -29
    assert angles.max() > 29

    x, _ = centres(distorted(right_of_middle, {"scale": 0.25}))
    factors = x / 8.5
    assert 0.74 < factors.min() < 0.76
    assert 1.24 < factors.max() < 1.26

    for moved in centres(distorted(dot(14, 14), {"elastic": 0.05})):
        # 0.05 * 28 pixels, which the blob's own bending blurs a little.
        assert (moved - 0.5).square().mean().sqrt() == pytest.approx(1.4, rel=0.1)


def test_displacements_have_one_size_everywhere_and_are_smooth_and_free_of_each_other() -> None:
    noise = torch.rand(4000, 2, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fields = smooth(noise)
    spread = fields.square().mean(0).sqrt()  # of each pixel and axis
    torch.testing.assert_close(spread, torch.ones(2, 28, 28), rtol=0, atol=0.06)
    assert fields.mean().abs() < 0.02

    def correlation(one: Tensor, other: Tensor) -> float:
        return float((one * other).mean())

    # A field filtered by a Gaussian resembles itself at a distance d by exp(-(d / 4)^2 / 4).
    assert correlation(fields[..., 14, 14], fields[..., 14, 18]) == pytest.approx(0.779, abs=0.03)
    assert correlation(fields[..., 14, 14], fields[..., 22, 14]) == pytest.approx(0.368, abs=0.03)
    assert abs(correlation(fields[:, 0], fields[:, 1])) < 0.02
