"""The net's mathematics in fewer passes over memory, on the same parameters and buffers."""

import ctypes
import math
from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tune_mnist.mnist.cpu import loops as kernels
from tune_mnist.mnist.cpu.convolution import convolve, image_gradient, weight_gradient
from tune_mnist.mnist.net import IMAGE_SHAPE, NORMS, Net, check_dropout

_LAST = torch.channels_last

# Images at a time in evaluation. On a CPU few, so that activations stay in the caches: an image
# takes 81 us by 16, 76 by 32, 81 to 89 by 64, 94 by 250 (lower ends of 3 times 12, AMD EPYC,
# AVX-512, one thread).
_CHUNK_ON_CPU = 32
_CHUNK_ON_GPU = 5_000


class _Block(NamedTuple):
    """A convolution and what follows it before the next one."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d | None  # after ReLU and before dropout; None in the last block
    pooled: bool  # 2 x 2 max-pool at the end


def training_forward(
    net: Net, images: Tensor, dropout: float | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return what `net.train()(images)` would, with a dropout rate and generator of its own.

    Batch norm's running statistics are updated as torch does. Gradients reach the parameters.

    Args:
        net: its own dropout rates and training flag are not looked at.
        images: float32 [B, 1, 28, 28].
        dropout: rate in [0, 1); a float 0 draws nothing from the generator. It may be a scalar
            tensor, whose value nobody waits for: a captured graph reads it anew at each replay.
        generator: source of the masks, on the images' device; None is torch's own.

    Returns:
        Log-probabilities [B, 10].
    """
    if not isinstance(dropout, Tensor):
        check_dropout(dropout)
    if kernels.COMPILED and not isinstance(dropout, Tensor) and _is_plain(images):
        parameters = list(net.features.parameters())
        features = _CompiledFeatures.apply(net, images, dropout, generator, *parameters)
    else:
        features = _train_features(net, images, dropout, generator)
    return F.log_softmax(net.classifier(features.flatten(1)), dim=1)


@torch.inference_mode()
def evaluation_forward(net: Net, images: Tensor) -> Tensor:
    """Return what `net.eval()(images)` would, for any number of images and without gradients.

    Batch norm is an affine map here, which the next convolution absorbs exactly, as nothing is
    padded. The one before the max-pool stays: a negative scale would make its maximum a minimum.

    Args:
        net: its training flag is not looked at.
        images: float32 [N, 1, 28, 28].

    Returns:
        Log-probabilities [N, 10].
    """
    layers = list(_fold_norms(net))
    outputs = []
    size = _CHUNK_ON_CPU if images.device.type == "cpu" else _CHUNK_ON_GPU
    for chunk in torch.split(images, size):
        h = _channels_last(chunk)
        for weight, bias, last, affine in layers:
            h = convolve(h, weight, bias, relu=not last)
            if affine is not None:
                h = F.max_pool2d(torch.addcmul(affine[1], h, affine[0], out=h), 2)
        outputs.append(F.log_softmax(net.classifier(h.flatten(1)), dim=1))
    return torch.cat(outputs)


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed buffers for the next step; true where it understood.

    Otherwise glibc returns every buffer over 128 kB and the system clears 9,000 pages a step anew:
    53 ms a step become 67 (AMD EPYC, one thread, batch 128). The same can be had from outside by
    MALLOC_MMAP_THRESHOLD_=33554432 and MALLOC_TRIM_THRESHOLD_=2147483647. It holds for the whole
    process. What was kept so far goes back first: a thread keeps for itself, and a worker gives
    each of its trials a new one, which in an hour added up to 900 MB.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, malloc_trim = library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):  # not glibc
        return False
    malloc_trim(0)
    trim_threshold, mmap_threshold = -1, -3  # names of options in malloc.h
    return bool(mallopt(mmap_threshold, 32 * 1024**2) and mallopt(trim_threshold, 2**31 - 1))


def _is_plain(images: Tensor) -> bool:
    """Say whether the compiled kernels apply."""
    on_cpu = images.device.type == "cpu" and images.dtype == torch.float32
    return on_cpu and not images.requires_grad


def _channels_last(images: Tensor) -> Tensor:
    """Say by strides that one channel is last; torch takes it as first whichever is true."""
    return images.reshape(-1, *IMAGE_SHAPE[1:], 1).permute(0, 3, 1, 2)


def _blocks(net: Net) -> Iterator[_Block]:
    layers = list(net.features)
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for start, end in pairwise([*starts, len(layers)]):
        norms = [layer for layer in layers[start:end] if isinstance(layer, nn.BatchNorm2d)]
        yield _Block(
            convolution=cast(nn.Conv2d, layers[start]),
            norm=norms[0] if norms else None,
            pooled=isinstance(layers[end - 1], nn.MaxPool2d),
        )


def _fold_norms(
    net: Net,
) -> Iterator[tuple[Tensor, Tensor, bool, tuple[Tensor, Tensor] | None]]:
    """Yield weight, bias, whether it is the last, and the affine map before a pool, by layer."""
    before: tuple[Tensor, Tensor] | None = None  # scale and shift [C] still to be applied
    for convolution, norm, pooled in _blocks(net):
        weight, bias = convolution.weight, _present(convolution.bias)
        if before is not None:
            bias = bias + (weight * before[1].view(1, -1, 1, 1)).sum((1, 2, 3))
            weight = weight * before[0].view(1, -1, 1, 1)
        before = affine = None
        if norm is not None:
            scale = norm.weight * (_present(norm.running_var) + norm.eps).rsqrt()
            before = (scale, norm.bias - _present(norm.running_mean) * scale)
            if pooled:
                affine, before = (before[0].view(1, -1, 1, 1), before[1].view(1, -1, 1, 1)), None
        yield weight.contiguous(memory_format=_LAST), bias, norm is None, affine


def _present(tensor: Tensor | None) -> Tensor:
    """Narrow the type of what torch's modules may lack but the net's have."""
    return cast(Tensor, tensor)


def _draw_seeds(generator: torch.Generator | None, count: int) -> list[int]:
    """Draw the 64-bit seeds of the masks of one pass on a CPU."""
    seeds = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return cast(list[int], seeds.tolist())


def _train_features(
    net: Net, images: Tensor, dropout: float | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Apply the convolutional part by torch's operations: any device, no wait for a GPU."""
    h = _channels_last(images)
    drops = isinstance(dropout, Tensor) or dropout > 0
    factors = _draw_factors(net, images, dropout, generator) if drops else None
    for convolution, norm, pooled in _blocks(net):
        h = F.conv2d(h, convolution.weight, convolution.bias)
        if norm is None:
            continue
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        h = F.batch_norm(
            F.relu(h),
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=True,
            momentum=cast(float, norm.momentum),
            eps=norm.eps,
        )
        if factors is not None:
            h = h * next(factors).to(h.dtype)
        if pooled:
            h = F.max_pool2d(h, 2)
    return h


def _draw_factors(
    net: Net, images: Tensor, dropout: float | Tensor, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield what each dropout multiplies by: 0 at the rate asked for, else 1 / (1 - rate)."""
    shapes = list(_dropped_shapes(net, images))
    sizes = [math.prod(shape) for shape in shapes]
    if isinstance(dropout, Tensor) or images.device.type != "cpu":
        # All at once: a GPU starts a kernel for about as long as it draws. Uniform numbers are
        # multiples of 2^-24.
        drawn = torch.rand(sum(sizes), generator=generator, device=images.device)
        flat = iter(torch.split(drawn.ge_(dropout).mul_(1 / (1 - dropout)), sizes))
    else:
        flat = _draw_on_cpu(sizes, dropout, generator)
    for part, shape in zip(flat, shapes, strict=True):
        yield part.view(shape).permute(0, 3, 1, 2)


def _dropped_shapes(net: Net, images: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield images, height, width and channels of what each dropout is applied to."""
    height, width = IMAGE_SHAPE[1:]
    for convolution, norm, pooled in _blocks(net):
        height -= convolution.kernel_size[0] - 1
        width -= convolution.kernel_size[1] - 1
        if norm is not None:
            yield len(images), height, width, convolution.out_channels
        if pooled:
            height, width = height // 2, width // 2


def _draw_on_cpu(
    sizes: list[int], dropout: float, generator: torch.Generator | None
) -> Iterator[Tensor]:
    for size, seed in zip(sizes, _draw_seeds(generator, len(sizes)), strict=True):
        keep = np.empty(size, np.uint8)
        kernels.draw_keep(seed, dropout, keep)
        yield torch.from_numpy(keep).to(torch.float32).mul_(1 / (1 - dropout))


def _flat(tensor: Tensor) -> Any:
    """View a channels-last tensor as a flat array."""
    return tensor.permute(0, 2, 3, 1).view(-1).numpy()


class _Saved(NamedTuple):
    """What the backward of one block needs."""

    inputs: Tensor  # [B, C_in, H + K - 1, W + K - 1]
    rectified: Tensor  # after ReLU [B, C, H, W]
    keep: Tensor  # mask, uint8 and flat; empty where nothing is dropped
    mean: Tensor  # [C]
    inverse_std: Tensor  # [C]
    winner: Tensor  # uint8, of the max-pool; empty where there is none


class _CompiledFeatures(torch.autograd.Function):
    """The convolutional part on a CPU: torch's convolutions, `kernels` for all the rest.

    Autograd sees one node. Each block keeps two activations and one byte an element, and the
    gradients of the activations live in one buffer a block, changed in place.
    """

    @staticmethod
    @np.errstate(all="ignore")  # a net that diverges says so by its loss
    def forward(
        ctx: Any,
        net: Net,
        images: Tensor,
        dropout: float,
        generator: torch.Generator | None,
        *parameters: Tensor,
    ) -> Tensor:
        h = _channels_last(images)
        seeds = iter(_draw_seeds(generator, NORMS) if dropout > 0 else ())
        saved: list[_Saved] = []
        for convolution, norm, pooled in _blocks(net):
            bias = _present(convolution.bias)
            x = convolve(h, convolution.weight, bias, relu=norm is not None)
            if norm is None:
                last, h = h, x
                break
            keep = np.empty(x.numel() if dropout > 0 else 0, np.uint8)
            if dropout > 0:
                kernels.draw_keep(next(seeds), dropout, keep)
            mean, variance = kernels.moments(_flat(x), x.shape[1])
            _update_running(norm, mean, variance, x.numel() // x.shape[1])
            inverse_std = 1 / np.sqrt(variance + np.float32(norm.eps))
            scale = norm.weight.detach().numpy() * inverse_std * np.float32(1 / (1 - dropout))
            shift = norm.bias.detach().numpy() * np.float32(1 / (1 - dropout)) - mean * scale
            out = torch.empty_like(x)
            kernels.scale_and_drop(_flat(x), keep, scale, shift, _flat(out))
            winner = np.empty(0, np.uint8)
            if pooled:
                out, winner = _pool(out)
            arrays = (torch.from_numpy(array) for array in (keep, mean, inverse_std, winner))
            saved.append(_Saved(h, x, *arrays))
            h = out
        ctx.dropout, ctx.blocks = dropout, len(saved)
        # Autograd lets these go right after the backward, even where someone keeps the loss.
        ctx.save_for_backward(last, *chain.from_iterable(saved), *parameters)
        return h

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    @np.errstate(all="ignore")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        last, *tensors, weight, _ = ctx.saved_tensors
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
            gradient = gradient.contiguous(memory_format=_LAST)
            flat, flat_x = _flat(gradient), _flat(x)
            sums, products = kernels.norm_backward_sums(flat, keep, flat_x, mean)
            by_gradient = scale.detach().numpy() * inverse_std * factor
            count = flat.size // mean.size
            by_x = -by_gradient * inverse_std**2 * (products / count).astype(np.float32)
            constant = -by_gradient * (sums / count).astype(np.float32) - by_x * mean
            of_bias = kernels.norm_and_relu_backward(
                flat, keep, flat_x, by_gradient, by_x, constant
            )
            of_norm = (products * inverse_std * factor, sums * factor)
            others = (of_bias, *of_norm)
            gradients = [
                weight_gradient(gradient, inputs, weight),
                *(torch.from_numpy(array.astype(np.float32)) for array in others),
                *gradients,
            ]
            if index > 0:
                gradient = image_gradient(gradient, inputs, weight)
        return None, None, None, None, *gradients


def _update_running(
    norm: nn.BatchNorm2d, mean: kernels.Floats, variance: kernels.Floats, count: int
) -> None:
    """Move the running statistics as torch does, towards the unbiased variance."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = cast(float, norm.momentum)
    unbiased = variance * np.float32(count / (count - 1))
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        _present(running).lerp_(torch.from_numpy(new), momentum)


def _pool(x: Tensor) -> tuple[Tensor, kernels.Bytes]:
    """Max-pool [B, C, 2 H, 2 W] to [B, C, H, W]; also note which pixel won."""
    batch, channels, height, width = x.shape
    out = torch.empty((batch, channels, height // 2, width // 2), memory_format=_LAST)
    winner = np.empty((batch * height // 2, width // 2, channels), np.uint8)
    pairs = _flat(x).reshape(-1, 2, width // 2, 2 * channels)
    kernels.max_pool(pairs, channels, _flat(out).reshape(winner.shape), winner)
    return out, winner


def _pool_backward(gradient: Tensor, winner: kernels.Bytes, x: Tensor) -> Tensor:
    """Return the gradient of the pool's input, which has the shape of `x`."""
    out = torch.empty_like(x)
    channels, width = x.shape[1], x.shape[3]
    pairs = _flat(out).reshape(-1, 2, width // 2, 2 * channels)
    kernels.max_pool_backward(_flat(gradient).reshape(winner.shape), winner, channels, pairs)
    return out
