"""Loops over memory for which torch needs several passes, compiled by numba where it is installed.

Arrays are flat, in channels-last order: element `i` belongs to channel `i % channels`. Without
numba `COMPILED` is false and only `draw_keep` may be called; it gives the same bits by NumPy.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bytes = NDArray[np.uint8]

Loop = TypeVar("Loop", bound=Callable[..., Any])

try:
    from numba import njit  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    COMPILED = False

    def compiled(loop: Loop) -> Loop:
        """Leave a loop to Python."""
        return loop

else:
    COMPILED = True
    # "contract" allows fused multiply-add and nothing else: NaN has to stay NaN.
    compiled = njit(  # type: ignore[assignment, unused-ignore]
        cache=True, nogil=True, error_model="numpy", fastmath={"contract"}
    )

# Channels (8, 16 or 32) are repeated to rows of 64 floats, so that every inner loop has one fixed
# length and fills whole vector registers; 64 rows (16 kB) are summed in float32 before float64.
_WIDTH = 64
_ROWS = 64
_WORDS = 1024  # random words made at a time: 8 kB, which stay in the first-level cache

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def draw_keep(seed: int, dropout: float, keep: Bytes) -> None:
    """Fill `keep` with independent bytes, 0 at rate `dropout` (rounded to 2^-16) and else 1.

    The bits are those of SplitMix64 started at `seed` (64 bits), 16 of them for each byte. Made in
    registers they cost 0.06 ns a byte, against 0.7 ns for 64-bit words of torch's generator and
    5 ns for its `bernoulli_` (AMD EPYC, AVX-512, one thread).
    """
    threshold = round(dropout * 2**16)
    fill = _fill_keep if COMPILED else _fill_keep_by_numpy
    fill(np.uint64(seed % 2**64), np.int32(threshold), keep)


@compiled
def _fill_keep(seed: np.uint64, threshold: np.int32, keep: Bytes) -> None:
    words = np.empty(_WORDS, np.uint64)
    quarters = words.view(np.uint16)
    for start in range(0, keep.size, quarters.size):
        first = np.uint64(start // 4 + 1)
        for i in range(_WORDS):
            word = seed + (first + np.uint64(i)) * _GOLDEN
            word = (word ^ (word >> _SHIFT_1)) * _MIX_1
            word = (word ^ (word >> _SHIFT_2)) * _MIX_2
            words[i] = word ^ (word >> _SHIFT_3)
        block = keep[start : start + quarters.size]
        for i in range(block.size):
            block[i] = np.int32(quarters[i]) >= threshold


def _fill_keep_by_numpy(seed: np.uint64, threshold: np.int32, keep: Bytes) -> None:
    size = 16 * _WORDS  # 128 kB, which stay in the second-level cache
    steps = np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN
    for start in range(0, keep.size, 4 * size):
        word = steps + np.uint64((int(seed) + start // 4 * int(_GOLDEN)) % 2**64)
        word ^= word >> _SHIFT_1
        word *= _MIX_1
        word ^= word >> _SHIFT_2
        word *= _MIX_2
        word ^= word >> _SHIFT_3
        block = keep[start : start + 4 * size]
        quarters = word.view(np.uint16)[: block.size]
        np.greater_equal(
            quarters, np.uint16(min(int(threshold), 2**16 - 1)), out=block.view(np.bool_)
        )
        if threshold == 2**16:
            block[:] = 0


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
    zero = np.float32(0)
    means = _spread(mean)
    sums, products = np.zeros(_WIDTH), np.zeros(_WIDTH)
    part, part_products = np.empty(_WIDTH, np.float32), np.empty(_WIDTH, np.float32)
    rows, gradient_rows, keep_rows = _rows(x), _rows(gradient), _rows(keep)
    for first in range(0, rows.shape[0], _ROWS):
        part[:] = 0
        part_products[:] = 0
        last = min(rows.shape[0], first + _ROWS)
        if keep.size == 0:
            for row in range(first, last):
                for c in range(_WIDTH):
                    value = gradient_rows[row, c]
                    part[c] += value
                    part_products[c] += value * (rows[row, c] - means[c])
        else:
            for row in range(first, last):
                for c in range(_WIDTH):
                    # A product: LLVM gives up vectors for a choice that feeds a sum.
                    value = gradient_rows[row, c] * np.float32(keep_rows[row, c])
                    part[c] += value
                    part_products[c] += value * (rows[row, c] - means[c])
        sums += part
        products += part_products
    for i in range(rows.size, x.size):
        c = i - rows.size
        value = gradient[i] if keep.size == 0 or keep[i] else zero
        sums[c] += value
        products[c] += value * (x[i] - means[c])
    return _gather(sums, mean.size), _gather(products, mean.size)


@compiled
def norm_and_relu_backward(
    gradient: Floats, keep: Bytes, x: Floats, by_gradient: Floats, by_x: Floats, constant: Floats
) -> Doubles:
    """Replace the gradient by `by_gradient * kept + by_x * x + constant`, or 0 where `x` is 0.

    Returns:
        Its sum over each channel.
    """
    zero = np.float32(0)
    a, b, d = _spread(by_gradient), _spread(by_x), _spread(constant)
    sums, part = np.zeros(_WIDTH), np.empty(_WIDTH, np.float32)
    rows, gradient_rows, keep_rows = _rows(x), _rows(gradient), _rows(keep)
    for first in range(0, rows.shape[0], _ROWS):
        last = min(rows.shape[0], first + _ROWS)
        if keep.size == 0:
            for row in range(first, last):
                for c in range(_WIDTH):
                    at = rows[row, c]
                    value = a[c] * gradient_rows[row, c] + (b[c] * at + d[c])
                    gradient_rows[row, c] = zero if at <= zero else value
        else:
            for row in range(first, last):
                for c in range(_WIDTH):
                    at = rows[row, c]
                    value = gradient_rows[row, c]
                    value = value if keep_rows[row, c] else zero
                    value = a[c] * value + (b[c] * at + d[c])
                    gradient_rows[row, c] = zero if at <= zero else value
        part[:] = 0
        for row in range(first, last):  # a loop of its own, as LLVM needs it for vectors
            for c in range(_WIDTH):
                part[c] += gradient_rows[row, c]
        sums += part
    for i in range(rows.size, x.size):
        c = i - rows.size
        value = gradient[i] if keep.size == 0 or keep[i] else zero
        value = a[c] * value + (b[c] * x[i] + d[c])
        gradient[i] = zero if x[i] <= zero else value
        sums[c] += gradient[i]
    return _gather(sums, by_x.size)


@compiled
def max_pool(x: Floats, channels: int, out: Floats, winner: Bytes) -> None:
    """Take the greatest of each 2 x 2 pixels and note which (0 to 3) it was; NaN is greatest.

    Args:
        x: images [B, 2 H, 2 W, channels], given as [B * H, 2, W, 2 * channels].
        channels: number of channels.
        out: [B * H, W, channels].
        winner: [B * H, W, channels].
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
