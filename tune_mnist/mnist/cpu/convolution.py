"""The net's convolutions and their gradients: in vector code where that serves, else torch's."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tune_mnist.mnist.cpu import loops as kernels

if kernels.COMPILED:
    from tune_mnist.mnist.cpu import llvm as vector_convolution

_LAST = torch.channels_last


def convolve(images: Tensor, weight: Tensor, bias: Tensor, *, relu: bool) -> Tensor:
    """Return the convolution of images [B, C, S, S], where asked for after ReLU.

    Nothing is padded. The result is in channels-last order where the images are. No gradient is
    kept: see the functions below.
    """
    outputs, _, kernel, _ = weight.shape
    if _in_vector_code(images, weight, channels=outputs):
        side = images.shape[2] - kernel + 1
        out = torch.empty((len(images), outputs, side, side), memory_format=_LAST)
        arrays = _array(images), weight.detach().numpy(), bias.detach().numpy(), _array(out)
        vector_convolution.convolve(*arrays, relu=relu)
        return out
    out = F.conv2d(images, weight.contiguous(memory_format=_LAST), bias)
    return out.relu_() if relu else out


def image_gradient(gradient: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the images.

    Args:
        gradient: that of the convolution [B, C_out, S - K + 1, S - K + 1].
        images: [B, C_in, S, S].
        weight: [C_out, C_in, K, K].
    """
    if _in_vector_code(images, weight, channels=weight.shape[1]):
        out = torch.empty_like(images)
        vector_convolution.input_gradient(_array(gradient), weight.detach().numpy(), _array(out))
        return out
    return _torchs_gradient(gradient, images, weight, which=0)


def weight_gradient(gradient: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the weight; arguments as above."""
    if _in_vector_code(images, weight, channels=weight.shape[0]):
        return torch.from_numpy(
            vector_convolution.weight_gradient(_array(images), _array(gradient))
        )
    return _torchs_gradient(gradient, images, weight, which=1)


def _torchs_gradient(gradient: Tensor, images: Tensor, weight: Tensor, *, which: int) -> Tensor:
    """Return the gradient of the images (0) or of the weight (1)."""
    gradients = torch.ops.aten.convolution_backward(
        gradient,
        images,
        weight.contiguous(memory_format=_LAST),
        [weight.shape[0]],
        [1, 1],  # stride
        [0, 0],  # padding
        [1, 1],  # dilation
        False,  # transposed
        [0, 0],
        1,  # groups
        [which == 0, which == 1, False],
    )
    return gradients[which]  # type: ignore[no-any-return]


def _in_vector_code(images: Tensor, weight: Tensor, *, channels: int) -> bool:
    """Say whether the vector code serves, and the channels of its result suit it.

    It runs in one thread. In two, oneDNN took nine tenths of its time for a training step and as
    much for an evaluation (n = 2 epochs, AMD EPYC).
    """
    if not kernels.COMPILED or torch.get_num_threads() > 1:
        return False
    if images.device.type != "cpu" or {images.dtype, weight.dtype} != {torch.float32}:
        return False
    square = images.shape[2] == images.shape[3]
    in_order = images.is_contiguous(memory_format=_LAST)
    return square and in_order and vector_convolution.serves(channels)


def _array(images: Tensor) -> Any:
    """View channels-last images [B, C, H, W] as an array [B, H, W, C]."""
    return images.permute(0, 2, 3, 1).numpy()
