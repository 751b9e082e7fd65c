"""The compiled arithmetic of a CPU, behind one door: a run asks `backend` once.

At its first use in a process compiled code must compute what torch computes. Otherwise an error of
numba, of LLVM or of ours, on a kind of CPU that it was never tried on, would train wrongly and
nobody would notice.
"""

import ctypes
import warnings
from copy import deepcopy
from functools import cache, partial

import torch
from torch import Tensor

from tune_mnist.mnist.forward import TORCH, Backend
from tune_mnist.mnist.net import IMAGE_SHAPE, Net
from tune_mnist.mnist.step import FlatNet

TOLERANCE = 1e-3  # of a result's norm; what was tried is within 2e-5 (AVX-512, AVX2, oneDNN)


def backend(net: Net, threads: int) -> Backend:
    """Return what computes a net's convolutional part fastest and correctly in so many threads."""
    weight = net.classifier.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return TORCH
    return _compiled(one_thread=threads == 1)


@cache
def _compiled(one_thread: bool) -> Backend:
    """Return the compiled backend, or torch's if there is none or it computes wrongly."""
    try:
        # numba may be missing, and takes half a second to import.
        from tune_mnist.mnist.cpu.convolution import convolutions
        from tune_mnist.mnist.cpu.features import compiled_features

        chosen = convolutions(one_thread)
        compiled = Backend(partial(compiled_features, chosen), chosen.convolve)
        fault = _fault(compiled)
    except ModuleNotFoundError:
        return TORCH
    except Exception as error:  # numba and LLVM fail in many ways
        fault = f"they fail with {type(error).__name__}: {error}"
    if fault is None:
        return compiled
    warnings.warn(
        f"the compiled kernels are not used on this CPU: {' '.join(fault.split())}; torch "
        "computes instead, correctly but more slowly",
        RuntimeWarning,
        stacklevel=3,
    )
    return TORCH


def _fault(candidate: Backend) -> str | None:
    """Return how a backend differs from torch in float64 on a few images, None if it does not."""
    # Of 60 seeds the one whose values keep the greatest distance from the kinks of ReLU and pool.
    arbitrary = torch.Generator().manual_seed(2)
    flat = FlatNet(torch.device("cpu"))
    flat.vector.uniform_(-0.5, 0.5, generator=arbitrary)
    images = torch.rand(2, *IMAGE_SHAPE, generator=arbitrary)
    for dropout in (0.0, 0.5):
        found = _results(candidate, deepcopy(flat.net), images, dropout)
        expected = _results(TORCH, deepcopy(flat.net).double(), images.double(), dropout)
        for name, right in expected.items():
            error = float((found[name] - right).norm() / right.norm())
            if not error < TOLERANCE:  # nor NaN
                return f"their {name} is off by {error:.2g} of its norm"
    return None


def _results(candidate: Backend, net: Net, images: Tensor, dropout: float) -> dict[str, Tensor]:
    """Return features, gradients and batch norm's statistics of one training pass, by name."""
    features = candidate.features(net, images, dropout, torch.Generator().manual_seed(2))
    weights = dict(net.features.named_parameters())
    top = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    gradients = torch.autograd.grad(features, list(weights.values()), top)
    found = {f"gradient of {name}": each for name, each in zip(weights, gradients, strict=True)}
    return {"result": features.detach(), **found, **dict(net.features.named_buffers())}


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed buffers for the next step; True where it understood.

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
