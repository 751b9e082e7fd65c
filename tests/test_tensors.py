import warnings
from dataclasses import fields, replace

import numpy as np
import torch

from tune_mnist.mnist.data import Mnist, Split, split
from tune_mnist.mnist.images import SplitTensors, normalised, scaled


def read_only(data: Split) -> Split:
    """A split as it comes out of shared memory."""
    arrays = {entry.name: getattr(data, entry.name).copy() for entry in fields(data)}
    for array in arrays.values():
        array.setflags(write=False)
    return Split(**arrays)


def test_read_only_images_are_shared_without_a_warning(small_mnist: Mnist) -> None:
    data = read_only(split(small_mnist, holdout=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = SplitTensors.on(data, "cpu")
    for name in ("train_images", "val_images", "test_images"):
        array, tensor = getattr(data, name), getattr(tensors, name)
        assert tensor.data_ptr() == array.ctypes.data
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensors.device == torch.device("cpu")


def test_labels_are_what_the_loss_takes(small_mnist: Mnist) -> None:
    data = split(small_mnist, holdout=False)
    tensors = SplitTensors.on(data, "cpu")
    assert tensors.train_labels.dtype == tensors.test_labels.dtype == torch.int64
    assert tensors.train_labels.tolist() == data.train_labels.tolist()
    assert len(tensors.val_labels) == len(tensors.val_images) == 0


def test_scaling_takes_bytes_to_zero_and_one_and_leaves_them_alone() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 28, 3)
    pixels = scaled(images)
    assert pixels.shape == (2, 1, 28, 3)
    torch.testing.assert_close(pixels[0, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    assert images[0, 0].tolist() == [0, 51, 255]


def test_normalised_training_images_have_mean_0_and_deviation_1(mnist: Mnist) -> None:
    pixels = normalised(scaled(torch.from_numpy(mnist.train_images)))
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3


def test_a_split_takes_the_place_of_one_as_large(small_mnist: Mnist) -> None:
    first, second = (
        replace(split(small_mnist, holdout=True, images=20), test_labels=labels)
        for labels in (small_mnist.test_labels, small_mnist.test_labels[::-1].copy())
    )
    room = SplitTensors.room_for(first, "cpu")
    assert not room.train_images.any()
    images = room.train_images
    room.fill(first)
    room.fill(second)
    assert room.train_images is images
    for name, array in vars(second).items():
        assert getattr(room, name).tolist() == array.tolist()
    assert room.fits(first)
    assert not room.fits(split(small_mnist, holdout=True, images=30))
