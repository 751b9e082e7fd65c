"""The net's convolutions and their gradients without autograd: by torch, or by vector code.

Images are square and channels last, nothing is padded. Vector code serves one thread, any number
of images, and the net's shapes: channels of results that eight divides.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from tune_mnist.mnist.cpu import llvm
from tune_mnist.mnist.cpu.loops import Floats
from tune_mnist.mnist.forward import LAST, torch_convolve

# From a filter's three weights to the values at four points, and the same in two dimensions.
_FILTER = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_FILTERS = np.kron(_FILTER, _FILTER)  # [16, 9]


class Convolutions(NamedTuple):
    """A convolution and its gradients.

    Images are [B, C_in, S, S], weights [C_out, C_in, K, K], results and their gradients
    [B, C_out, S - K + 1, S - K + 1].
    """

    # Images, weight, bias, whether ReLU follows -> result; NaN stays NaN.
    convolve: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    # Gradient, images, weight -> gradient of the images, and of the weight.
    image_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor]


def convolutions(one_thread: bool) -> Convolutions:
    """Return the faster ones for this CPU.

    Vector code runs in one thread. In two, oneDNN took nine tenths of its time for a training step
    and as much for an evaluation (n = 2 epochs, AMD EPYC).
    """
    if one_thread and llvm.LANES > 0:
        return Convolutions(convolve, image_gradient, weight_gradient)
    return Convolutions(
        torch_convolve,
        lambda gradient, images, weight: F.conv_transpose2d(
            gradient, weight.contiguous(memory_format=LAST)
        ),
        lambda gradient, images, weight: conv2d_weight(images, weight.shape, gradient),  # type: ignore[no-untyped-call]
    )


def convolve(images: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    outputs, _, kernel, _ = weight.shape
    side = images.shape[2] - kernel + 1
    out = torch.empty((len(images), outputs, side, side), memory_format=LAST)
    filters = weight.detach().numpy().transpose(2, 3, 1, 0)
    _convolve(_array(images), filters, bias.detach().numpy(), _array(out), padding=0, relu=relu)
    return out


def image_gradient(gradient: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty(images.shape, memory_format=LAST)
    filters = weight.detach().numpy().transpose(2, 3, 0, 1)[::-1, ::-1]
    zeros = np.zeros(images.shape[1], np.float32)
    padding = len(filters) - 1
    _convolve(_array(gradient), filters, zeros, _array(out), padding=padding, relu=False)
    return out


def weight_gradient(gradient: Tensor, images: Tensor, weight: Tensor) -> Tensor:
    outputs, inputs, kernel, _ = weight.shape
    x, top = np.ascontiguousarray(_array(images)), np.ascontiguousarray(_array(gradient))
    side, rows = x.shape[1], top.shape[1]
    filters = np.zeros((kernel, kernel, inputs, outputs), np.float32)
    if _suits_winograd(filters, top):
        sums = np.zeros((llvm.POINTS, inputs * outputs), np.float32)
        scratch = _scratch((rows // 2) ** 2, inputs + outputs)
        llvm.weight_sums_of_tiles(rows // 2, inputs, outputs)(x, top, sums, scratch)
        np.matmul(_FILTERS.T, sums, out=filters.reshape(9, -1))
    else:
        llvm.weight_sums_of_rows(side, inputs, outputs, kernel)(x, top, filters)
    return torch.from_numpy(filters.transpose(3, 2, 0, 1))


def _convolve(
    x: Floats, filters: Floats, bias: Floats, out: Floats, *, padding: int, relu: bool
) -> None:
    """Convolve x, padded with zeros, with filters [K, K, C_in, C_out] into out."""
    kernel, _, inputs, outputs = filters.shape
    x, filters = np.ascontiguousarray(x), np.ascontiguousarray(filters)
    if _suits_winograd(filters, out):
        tiles = out.shape[1] // 2
        zeros = np.zeros(x.shape[2] * inputs, np.float32)
        scratch = _scratch(tiles, inputs + outputs)
        loop = llvm.convolution_by_tiles(tiles, inputs, outputs, padding, int(relu))
        loop(x, _FILTERS @ filters.reshape(9, -1), bias, out, scratch, zeros)
    else:
        if padding:
            x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        loop = llvm.convolution_by_rows(x.shape[1], inputs, outputs, kernel, int(relu))
        loop(x, filters, bias, out)


def _suits_winograd(filters: Floats, results: Floats) -> bool:
    kernel, _, inputs, outputs = filters.shape
    whole: bool = inputs % 8 == outputs % 8 == results.shape[1] % 2 == 0
    return kernel == 3 and whole


def _scratch(tiles: int, channels: int) -> Floats:
    """Return room for tiles at all points, with some to spare for alignment."""
    return np.empty(llvm.POINTS * tiles * channels + 2 * llvm.LINE // llvm.FLOAT, np.float32)


def _array(images: Tensor) -> Any:
    """View channels-last images [B, C, H, W] as an array [B, H, W, C]."""
    return images.permute(0, 2, 3, 1).numpy()
