"""The convolutional part of a training step on a CPU, as one autograd function.

`Convolutions` do the convolutions and compiled `loops` all the rest. Each block keeps two
activations and one byte an element, and the gradients of the activations live in one buffer a
block, changed in place.
"""

from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tune_mnist.mnist.cpu import loops
from tune_mnist.mnist.cpu.convolution import Convolutions
from tune_mnist.mnist.cpu.loops import Bytes, Floats
from tune_mnist.mnist.forward import LAST, channels_last, draw_seeds, present, torch_features
from tune_mnist.mnist.net import NORMS, Net, blocks


def compiled_features(
    convolutions: Convolutions,
    net: Net,
    images: Tensor,
    dropout: float | Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Compute `Backend.features`, for float32 nets on a CPU."""
    if isinstance(dropout, Tensor) or images.requires_grad:
        return torch_features(net, images, dropout, generator)
    parameters = list(net.features.parameters())
    features: Tensor = _Features.apply(convolutions, net, images, dropout, generator, *parameters)
    return features


class _Saved(NamedTuple):
    """What the backward of one block needs."""

    inputs: Tensor  # [B, C_in, H + K - 1, W + K - 1]
    rectified: Tensor  # after ReLU [B, C, H, W]
    keep: Tensor  # mask, uint8 and flat; empty where nothing is dropped
    mean: Tensor  # [C]
    inverse_std: Tensor  # [C]
    winner: Tensor  # uint8, of the max-pool; empty where there is none


class _Features(torch.autograd.Function):
    @staticmethod
    @np.errstate(all="ignore")  # a net that diverges shows it by its loss
    def forward(
        ctx: Any,
        convolutions: Convolutions,
        net: Net,
        images: Tensor,
        dropout: float,
        generator: torch.Generator | None,
        *parameters: Tensor,
    ) -> Tensor:
        h = channels_last(images)
        seeds = iter(draw_seeds(generator, NORMS) if dropout > 0 else ())
        saved: list[_Saved] = []
        for convolution, norm, pooled in blocks(net):
            bias = present(convolution.bias)
            x = convolutions.convolve(h, convolution.weight, bias, norm is not None)
            if norm is None:
                last, h = h, x
                break
            keep = np.empty(x.numel() if dropout > 0 else 0, np.uint8)
            if dropout > 0:
                loops.draw_keep(next(seeds), dropout, keep)
            mean, variance = loops.moments(_flat(x), x.shape[1])
            _update_running(norm, mean, variance, x.numel() // x.shape[1])
            inverse_std = 1 / np.sqrt(variance + np.float32(norm.eps))
            scale = norm.weight.detach().numpy() * inverse_std * np.float32(1 / (1 - dropout))
            shift = norm.bias.detach().numpy() * np.float32(1 / (1 - dropout)) - mean * scale
            out = torch.empty_like(x)
            loops.scale_and_drop(_flat(x), keep, scale, shift, _flat(out))
            winner = np.empty(0, np.uint8)
            if pooled:
                out, winner = _pool(out)
            arrays = (torch.from_numpy(array) for array in (keep, mean, inverse_std, winner))
            saved.append(_Saved(h, x, *arrays))
            h = out
        ctx.convolutions, ctx.dropout, ctx.blocks = convolutions, dropout, len(saved)
        # Autograd lets these go right after the backward, even where someone keeps the loss.
        ctx.save_for_backward(last, *chain.from_iterable(saved), *parameters)
        return h

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    @np.errstate(all="ignore")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        last, *tensors, weight, _ = ctx.saved_tensors
        _, image_gradient, weight_gradient = ctx.convolutions
        parameters = tensors[len(_Saved._fields) * ctx.blocks :]
        gradients = [weight_gradient(gradient, last, weight), gradient.sum((0, 2, 3))]
        gradient = image_gradient(gradient, last, weight)
        factor = np.float32(1 / (1 - ctx.dropout))
        for index in reversed(range(ctx.blocks)):
            start = len(_Saved._fields) * index
            inputs, x, *others = tensors[start : start + len(_Saved._fields)]
            keep, mean, inverse_std, winner = (tensor.numpy() for tensor in others)
            weight, _, scale, _ = parameters[4 * index : 4 * index + 4]
            if winner.size > 0:
                gradient = _pool_backward(gradient, winner, x)
            gradient = gradient.contiguous(memory_format=LAST)
            flat, flat_x = _flat(gradient), _flat(x)
            sums, products = loops.norm_backward_sums(flat, keep, flat_x, mean)
            by_gradient = scale.detach().numpy() * inverse_std * factor
            count = flat.size // mean.size
            by_x = -by_gradient * inverse_std**2 * (products / count).astype(np.float32)
            constant = -by_gradient * (sums / count).astype(np.float32) - by_x * mean
            of_bias = loops.norm_and_relu_backward(flat, keep, flat_x, by_gradient, by_x, constant)
            of_norm = (products * inverse_std * factor, sums * factor)
            gradients = [
                weight_gradient(gradient, inputs, weight),
                *(torch.from_numpy(array.astype(np.float32)) for array in (of_bias, *of_norm)),
                *gradients,
            ]
            if index > 0:
                gradient = image_gradient(gradient, inputs, weight)
        return None, None, None, None, None, *gradients


def _update_running(norm: nn.BatchNorm2d, mean: Floats, variance: Floats, count: int) -> None:
    """Move the running statistics as torch does, towards the unbiased variance."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = cast(float, norm.momentum)
    unbiased = variance * np.float32(count / (count - 1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        present(running).lerp_(torch.from_numpy(new), momentum)


def _pool(x: Tensor) -> tuple[Tensor, Bytes]:
    """Max-pool [B, C, 2 H, 2 W] to [B, C, H, W]; also note which pixel won."""
    batch, channels, height, width = x.shape
    out = torch.empty((batch, channels, height // 2, width // 2), memory_format=LAST)
    winner = np.empty((batch * height // 2, width // 2, channels), np.uint8)
    pairs = _flat(x).reshape(-1, 2, width // 2, 2 * channels)
    loops.max_pool(pairs, channels, _flat(out).reshape(winner.shape), winner)
    return out, winner


def _pool_backward(gradient: Tensor, winner: Bytes, x: Tensor) -> Tensor:
    """Return the gradient of the pool's input, which has the shape of `x`."""
    out = torch.empty_like(x)
    channels, width = x.shape[1], x.shape[3]
    pairs = _flat(out).reshape(-1, 2, width // 2, 2 * channels)
    loops.max_pool_backward(_flat(gradient).reshape(winner.shape), winner, channels, pairs)
    return out


def _flat(tensor: Tensor) -> Any:
    """View a channels-last tensor as a flat array."""
    return tensor.permute(0, 2, 3, 1).view(-1).numpy()
