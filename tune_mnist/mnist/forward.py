"""The net's mathematics in few passes over memory: a training pass, an evaluation, the loss.

The parameters and buffers are those of a `Net`, whose modules say the same more plainly. The
convolutional part is computed by a `Backend`: by torch's operations, which serve any device and
never wait for one, or by compiled code where `cpu.backend` finds that to be right and faster.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tune_mnist.mnist.images import normalised, scaled
from tune_mnist.mnist.net import IMAGE_SHAPE, Net, blocks

LAST = torch.channels_last

# Images at a time in evaluation. On a CPU few, so that activations stay in the caches: an image
# takes 81 us by 16, 76 by 32, 81 to 89 by 64, 94 by 250 (lower ends of 3 times 12, AMD EPYC,
# AVX-512, one thread).
_CHUNK_ON_CPU = 32
_CHUNK_ON_GPU = 5_000
_SCALED_ON_CPU = 1000  # images turned from bytes to floats at a time: 3 MB


class Backend(NamedTuple):
    """What computes the convolutional part of the net."""

    # Net, images, dropout rate, generator of the masks (None is torch's own) -> features
    # [B, 32, 5, 5], with gradients to the parameters. Batch norm's statistics are updated.
    features: Callable[[Net, Tensor, float | Tensor, torch.Generator | None], Tensor]
    # Images [B, C, S, S], weight, bias, whether ReLU follows -> their convolution, unpadded and
    # in channels-last order where the images are. Without gradients.
    convolve: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def torch_features(
    net: Net, images: Tensor, dropout: float | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Compute `Backend.features` by torch's operations, without a wait for a GPU."""
    h = channels_last(images)
    drops = isinstance(dropout, Tensor) or dropout > 0
    factors = _dropout_factors(net, images, dropout, generator) if drops else None
    for convolution, norm, pooled in blocks(net):
        h = F.conv2d(h, convolution.weight, convolution.bias)
        if norm is None:
            continue
        h = norm.train()(F.relu(h))
        if factors is not None:
            h = h * next(factors).to(h.dtype)
        if pooled:
            h = F.max_pool2d(h, 2)
    return h


def torch_convolve(images: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    out = F.conv2d(images, weight.contiguous(memory_format=LAST), bias)
    return out.relu_() if relu else out


TORCH = Backend(torch_features, torch_convolve)


def training_forward(
    net: Net,
    images: Tensor,
    dropout: float | Tensor,
    generator: torch.Generator | None,
    backend: Backend = TORCH,
) -> Tensor:
    """Return what `net.train()(images)` would, with a dropout rate and generator of its own.

    Images are float32 [B, 1, 28, 28], the result log-probabilities [B, 10]. Batch norm's running
    statistics are updated as torch does. A `dropout` of a float 0 draws nothing; a scalar tensor
    is read by the device alone, so a captured graph reads it anew at each replay.
    """
    features = backend.features(net, images, dropout, generator)
    return F.log_softmax(net.classifier(features.flatten(1)), dim=1)


def smoothed_loss(log_probs: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """Return the cross-entropy of log-probabilities [B, 10] against smoothed labels, int64 [B].

    `smoothing` of each label is the uniform distribution (arXiv 1512.00567, 7). A scalar tensor is
    read by the device alone.
    """
    loss = F.nll_loss(log_probs, labels)
    if not isinstance(smoothing, Tensor) and not smoothing:
        return loss
    return (1 - smoothing) * loss - smoothing * log_probs.mean()


@torch.inference_mode()
def evaluation_forward(net: Net, images: Tensor, backend: Backend = TORCH) -> Tensor:
    """Return what `net.eval()(images)` would, for any number of images and without gradients.

    Batch norm is an affine map here, which the next convolution absorbs exactly, as nothing is
    padded. The one before the max-pool stays: a negative scale would make its maximum a minimum.
    """
    layers = list(_fold_norms(net))
    outputs = []
    size = _CHUNK_ON_CPU if images.device.type == "cpu" else _CHUNK_ON_GPU
    for chunk in torch.split(images, size):
        h = channels_last(chunk)
        for weight, bias, last, affine in layers:
            h = backend.convolve(h, weight, bias, not last)
            if affine is not None:
                h = F.max_pool2d(torch.addcmul(affine[1], h, affine[0], out=h), 2)
        outputs.append(F.log_softmax(net.classifier(h.flatten(1)), dim=1))
    return torch.cat(outputs)


@dataclass(frozen=True)
class Score:
    """The result of evaluating a net on some images; NaN without images."""

    images: int = 0
    correct: int = 0
    loss: float = math.nan  # mean negative log-likelihood of an image's label

    @classmethod
    def of(cls, images: int, tally: Tensor) -> Self:
        """Read a `tally` over so many images; NaN stands for no evaluation."""
        correct, loss = tally.tolist()
        return cls() if math.isnan(correct) else cls(images, int(correct), loss)

    @property
    def accuracy(self) -> float:
        return self.correct / self.images if self.images else math.nan

    @property
    def lost(self) -> bool:
        """Whether there were images and the net has no finite answer for them."""
        return self.images > 0 and not math.isfinite(self.loss)


def evaluate(net: Net, images: Tensor, labels: Tensor, backend: Backend = TORCH) -> Score:
    """Score a net, which is left in evaluation mode, on images uint8 [N, 28, 28], labels [N]."""
    return Score.of(len(labels), tally(net, images, labels, backend))


def tally(net: Net, images: Tensor, labels: Tensor, backend: Backend = TORCH) -> Tensor:
    """Do what `evaluate` does, but leave correct and loss on the device, float32 [2]."""
    if not len(labels):
        return torch.full((2,), math.nan, device=labels.device)
    net.eval()
    size = _SCALED_ON_CPU if images.device.type == "cpu" else len(images)
    log_probs = torch.cat(
        [
            evaluation_forward(net, normalised(scaled(batch)), backend)
            for batch in torch.split(images, size)
        ]
    )
    loss = F.nll_loss(log_probs, labels)
    correct = (log_probs.argmax(1) == labels).sum()
    return torch.stack((correct.to(loss.dtype), loss))


def channels_last(images: Tensor) -> Tensor:
    """Declare one channel to be last by its strides; torch takes it as first whichever is true."""
    return images.reshape(-1, *IMAGE_SHAPE[1:], 1).permute(0, 3, 1, 2)


def present(tensor: Tensor | None) -> Tensor:
    """Narrow the type of what torch's modules may lack but the net's have."""
    return cast(Tensor, tensor)


def _fold_norms(
    net: Net,
) -> Iterator[tuple[Tensor, Tensor, bool, tuple[Tensor, Tensor] | None]]:
    """Yield weight, bias, whether it is the last, and the affine map before a pool, by layer."""
    before: tuple[Tensor, Tensor] | None = None  # scale and shift [C] still to be applied
    for convolution, norm, pooled in blocks(net):
        weight, bias = convolution.weight, present(convolution.bias)
        if before is not None:
            bias = bias + (weight * before[1].view(1, -1, 1, 1)).sum((1, 2, 3))
            weight = weight * before[0].view(1, -1, 1, 1)
        before = affine = None
        if norm is not None:
            scale = norm.weight * (present(norm.running_var) + norm.eps).rsqrt()
            before = (scale, norm.bias - present(norm.running_mean) * scale)
            if pooled:
                affine, before = (before[0].view(1, -1, 1, 1), before[1].view(1, -1, 1, 1)), None
        yield weight.contiguous(memory_format=LAST), bias, norm is None, affine


def _dropout_factors(
    net: Net, images: Tensor, dropout: float | Tensor, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """Yield what each dropout multiplies by: 0 at the rate asked for, else 1 / (1 - rate)."""
    shapes = list(_dropped_shapes(net, images))
    sizes = [math.prod(shape) for shape in shapes]
    if isinstance(dropout, Tensor) or images.device.type != "cpu":
        # All at once: a GPU starts a kernel for about as long as it draws. Uniform numbers are
        # multiples of 2^-24.
        drawn = torch.rand(sum(sizes), generator=generator, device=images.device)
        factors = drawn.ge_(dropout).mul_(1 / (1 - dropout))
        flat: Iterable[Tensor] = torch.split(factors, sizes)
    else:
        seeds = draw_seeds(generator, len(sizes))
        masks = (keep_mask(seed, dropout, size) for seed, size in zip(seeds, sizes, strict=True))
        flat = (torch.from_numpy(keep).to(torch.float32).mul_(1 / (1 - dropout)) for keep in masks)
    for part, shape in zip(flat, shapes, strict=True):
        yield part.view(shape).permute(0, 3, 1, 2)


def _dropped_shapes(net: Net, images: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield images, height, width and channels of what each dropout is applied to."""
    height, width = IMAGE_SHAPE[1:]
    for convolution, norm, pooled in blocks(net):
        height -= convolution.kernel_size[0] - 1
        width -= convolution.kernel_size[1] - 1
        if norm is not None:
            yield len(images), height, width, convolution.out_channels
        if pooled:
            height, width = height // 2, width // 2


def draw_seeds(generator: torch.Generator | None, count: int) -> list[int]:
    """Draw the 64-bit seeds of the masks of one pass on a CPU."""
    seeds = torch.empty(count, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return cast(list[int], seeds.tolist())


# SplitMix64: word number i is `mix(seed + i * GOLDEN)`, so words can be made in any order.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFT_1, SHIFT_2, SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def keep_mask(seed: int, dropout: float, size: int) -> npt.NDArray[np.uint8]:
    """Return independent bytes [size], 0 at rate `dropout` (rounded to 2^-16) and else 1.

    The bits are those of SplitMix64 started at `seed` (64 bits), 16 of them for each byte.
    `cpu.loops` makes the same ones in registers.
    """
    threshold = round(dropout * 2**16)
    if threshold == 2**16:  # which no 16 bits reach
        return np.zeros(size, np.uint8)
    keep = np.empty(size, np.uint8)
    words = 2**14  # at a time: 128 kB, which stay in the second-level cache
    steps = np.arange(1, words + 1, dtype=np.uint64) * GOLDEN
    for start in range(0, size, 4 * words):
        word = steps + np.uint64((seed + start // 4 * int(GOLDEN)) % 2**64)
        word ^= word >> SHIFT_1
        word *= MIX_1
        word ^= word >> SHIFT_2
        word *= MIX_2
        word ^= word >> SHIFT_3
        block = keep[start : start + 4 * words]
        np.greater_equal(
            word.view(np.uint16)[: block.size], np.uint16(threshold), out=block.view(np.bool_)
        )
    return keep
