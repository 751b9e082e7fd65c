"""Loops over memory for which torch needs several passes, compiled by numba.

Arrays are flat, in channels-last order: element `i` belongs to channel `i % channels`. numba keeps
compiled code on disk: in NUMBA_CACHE_DIR, beside this file or in a cache folder.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba  # type: ignore[import-not-found, import-untyped, unused-ignore]
import numpy as np
from numba.core import caching  # type: ignore[import-not-found, import-untyped, unused-ignore]
from numpy.typing import NDArray

from tune_mnist.errors import TuneMnistError
from tune_mnist.host import cache_dir
from tune_mnist.mnist.forward import GOLDEN, MIX_1, MIX_2, SHIFT_1, SHIFT_2, SHIFT_3

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]


_numba: Any = numba  # only parts of it have types
_FunctionCache: Any = caching.FunctionCache
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _KeptCode(_FunctionCache):  # type: ignore[misc]
    """numba's files of compiled code; where they are damaged or the disk is full, there are none.

    numba would raise the error, and take no folder at all for one too.
    """

    def load_overload(self, *arguments: Any) -> Any:
        with suppress(Exception):
            return super().load_overload(*arguments)
        return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):
            super().save_overload(*arguments)


def compiled(function: _Function) -> _Function:
    """Have numba compile a function when it is first called, and keep the code where it can."""
    # "contract" allows fused multiply-add and nothing else: NaN has to stay NaN.
    loop = _numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)
    try:
        loop._cache = _KeptCode(function)  # as njit(cache=True) does
    except RuntimeError:  # neither this file's folder nor numba's in a home can be written
        with suppress(RuntimeError, TuneMnistError):
            _numba.config.CACHE_DIR = str(cache_dir() / "numba")
            loop._cache = _KeptCode(function)
    return cast(_Function, loop)


# Channels (8, 16 or 32) are repeated to rows of 64 floats, so that every inner loop has one fixed
# length and fills whole vector registers; 64 rows (16 kB) are summed in float32 before float64.
_WIDTH = 64
_ROWS = 64
_WORDS = 1024  # random words made at a time: 8 kB, which stay in the first-level cache


def draw_keep(seed: int, dropout: float, keep: Bytes) -> None:
    """Fill `keep` with what `forward.keep_mask` returns.

    Made in registers the bits cost 0.06 ns a byte, against 0.7 ns for 64-bit words of torch's
    generator and 5 ns for its `bernoulli_` (AMD EPYC, AVX-512, one thread).
    """
    _fill_keep(np.uint64(seed % 2**64), np.int32(round(dropout * 2**16)), keep)


@compiled
def _fill_keep(seed: np.uint64, threshold: np.int32, keep: Bytes) -> None:
    words = np.empty(_WORDS, np.uint64)
    quarters = words.view(np.uint16)
    for start in range(0, keep.size, quarters.size):
        first = np.uint64(start // 4 + 1)
        for i in range(_WORDS):
            word = seed + (first + np.uint64(i)) * GOLDEN
            word = (word ^ (word >> SHIFT_1)) * MIX_1
            word = (word ^ (word >> SHIFT_2)) * MIX_2
            words[i] = word ^ (word >> SHIFT_3)
        block = keep[start : start + quarters.size]
        for i in range(block.size):
            block[i] = np.int32(quarters[i]) >= threshold


@compiled
def _spread(values: Floats) -> Floats:
    """Repeat one value per channel to a row."""
    row = np.empty(_WIDTH, np.float32)
    for c in range(_WIDTH):
        row[c] = values[c % values.size]
    return row


@compiled
def _gather(sums: Doubles, channels: int) -> Doubles:
    """Add up a row's repetitions of each channel."""
    totals = np.zeros(channels)
    for c in range(_WIDTH):
        totals[c % channels] += sums[c]
    return totals


@compiled
def _rows(array: NDArray[Any]) -> NDArray[Any]:
    """View all whole rows; indices of two dimensions are what lets LLVM use vectors here."""
    count = array.size // _WIDTH
    return array[: count * _WIDTH].reshape(count, _WIDTH)


@compiled
def moments(x: Floats, channels: int) -> tuple[Floats, Floats]:
    """Return each channel's mean and biased variance [channels]."""
    sums, squares = np.zeros(_WIDTH), np.zeros(_WIDTH)
    part, part_squares = np.empty(_WIDTH, np.float32), np.empty(_WIDTH, np.float32)
    # Sums are of differences to the first pixels' mean, so that little cancels in the variance.
    head = min(x.size, _ROWS * _WIDTH) // channels
    head_sums = np.zeros(channels)
    for i in range(head * channels):
        head_sums[i % channels] += x[i]
    shift = _spread((head_sums / head).astype(np.float32))

    rows = _rows(x)
    for first in range(0, rows.shape[0], _ROWS):
        part[:] = 0
        part_squares[:] = 0
        for row in range(first, min(rows.shape[0], first + _ROWS)):
            for c in range(_WIDTH):
                value = rows[row, c] - shift[c]
                part[c] += value
                part_squares[c] += value * value
        sums += part
        squares += part_squares
    for i in range(rows.size, x.size):
        c = i - rows.size
        sums[c] += x[i] - shift[c]
        squares[c] += (x[i] - shift[c]) ** 2

    count = x.size // channels
    offset = _gather(sums, channels) / count
    variance = _gather(squares, channels) / count - offset * offset
    for c in range(channels):
        variance[c] = 0.0 if variance[c] < 0 else variance[c]
    return (shift[:channels] + offset).astype(np.float32), variance.astype(np.float32)


@compiled
def scale_and_drop(x: Floats, keep: Bytes, scale: Floats, shift: Floats, out: Floats) -> None:
    """Write `scale * x + shift` where kept, else 0; an empty `keep` keeps everything."""
    zero = np.float32(0)
    scales, shifts = _spread(scale), _spread(shift)
    rows, out_rows, keep_rows = _rows(x), _rows(out), _rows(keep)
    if keep.size == 0:
        for row in range(rows.shape[0]):
            for c in range(_WIDTH):
                out_rows[row, c] = scales[c] * rows[row, c] + shifts[c]
    else:
        for row in range(rows.shape[0]):
            for c in range(_WIDTH):
                value = scales[c] * rows[row, c] + shifts[c]
                out_rows[row, c] = value if keep_rows[row, c] else zero
    for i in range(rows.size, x.size):
        c = i - rows.size
        out[i] = scales[c] * x[i] + shifts[c] if keep.size == 0 or keep[i] else zero


@compiled
def norm_backward_sums(
    gradient: Floats, keep: Bytes, x: Floats, mean: Floats
) -> tuple[Doubles, Doubles]:
    """Sum the kept gradient, and it times `x - mean`, per channel."""
    zero, drops = np.float32(0), keep.size > 0
    means = _spread(mean)
    sums, products = np.zeros(_WIDTH), np.zeros(_WIDTH)
    part, part_products = np.empty(_WIDTH, np.float32), np.empty(_WIDTH, np.float32)
    rows, gradient_rows, keep_rows = _rows(x), _rows(gradient), _rows(keep)
    for first in range(0, rows.shape[0], _ROWS):
        part[:] = 0
        part_products[:] = 0
        for row in range(first, min(rows.shape[0], first + _ROWS)):
            for c in range(_WIDTH):
                value = gradient_rows[row, c]
                if drops:  # a product: LLVM gives up vectors for a choice that feeds a sum
                    value *= np.float32(keep_rows[row, c])
                part[c] += value
                part_products[c] += value * (rows[row, c] - means[c])
        sums += part
        products += part_products
    for i in range(rows.size, x.size):
        c = i - rows.size
        value = gradient[i] if not drops or keep[i] else zero
        sums[c] += value
        products[c] += value * (x[i] - means[c])
    return _gather(sums, mean.size), _gather(products, mean.size)


@compiled
def norm_and_relu_backward(
    gradient: Floats, keep: Bytes, x: Floats, by_gradient: Floats, by_x: Floats, constant: Floats
) -> Doubles:
    """Replace the gradient by `by_gradient * kept + by_x * x + constant`, or 0 where `x` is 0.

    Return its sum over each channel.
    """
    zero, drops = np.float32(0), keep.size > 0
    a, b, d = _spread(by_gradient), _spread(by_x), _spread(constant)
    sums, part = np.zeros(_WIDTH), np.empty(_WIDTH, np.float32)
    rows, gradient_rows, keep_rows = _rows(x), _rows(gradient), _rows(keep)
    for first in range(0, rows.shape[0], _ROWS):
        last = min(rows.shape[0], first + _ROWS)
        for row in range(first, last):
            for c in range(_WIDTH):
                at, value = rows[row, c], gradient_rows[row, c]
                value = zero if drops and not keep_rows[row, c] else value
                value = a[c] * value + (b[c] * at + d[c])
                gradient_rows[row, c] = zero if at <= zero else value
        part[:] = 0
        for row in range(first, last):  # a loop of its own, as LLVM needs it for vectors
            for c in range(_WIDTH):
                part[c] += gradient_rows[row, c]
        sums += part
    for i in range(rows.size, x.size):
        c = i - rows.size
        value = gradient[i] if not drops or keep[i] else zero
        value = a[c] * value + (b[c] * x[i] + d[c])
        gradient[i] = zero if x[i] <= zero else value
        sums[c] += gradient[i]
    return _gather(sums, by_x.size)


@compiled
def max_pool(x: Floats, channels: int, out: Floats, winner: Bytes) -> None:
    """Take the greatest of each 2 x 2 pixels and note which (0 to 3) it was; NaN is greatest.

    Images [B, 2 H, 2 W, channels] are given as [B * H, 2, W, 2 * channels]; `out` and `winner` are
    [B * H, W, channels].
    """
    for row in range(x.shape[0]):
        for column in range(x.shape[2]):
            for c in range(channels):
                best, at = x[row, 0, column, c], np.uint8(0)
                for i in range(1, 4):
                    value = x[row, i // 2, column, i % 2 * channels + c]
                    if value > best or value != value:
                        best, at = value, np.uint8(i)
                out[row, column, c] = best
                winner[row, column, c] = at


@compiled
def max_pool_backward(gradient: Floats, winner: Bytes, channels: int, out: Floats) -> None:
    """Send each gradient to its winner and 0 to the other three; shapes as in `max_pool`."""
    for row in range(out.shape[0]):
        for column in range(out.shape[2]):
            for i in range(4):
                for c in range(channels):
                    won = winner[row, column, c] == i
                    out[row, i // 2, column, i % 2 * channels + c] = (
                        gradient[row, column, c] if won else np.float32(0)
                    )
