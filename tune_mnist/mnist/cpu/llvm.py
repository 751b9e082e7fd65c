"""Vector code for convolutions, emitted as LLVM and compiled by numba for AVX-512 or AVX2.

Its gain: all convolutions of a step take 29.7 ms instead of oneDNN's 50.3 (lower ends of n = 25,
AMD EPYC Zen 4, AVX-512, one thread, batches of 128), an evaluation of 15,000 images 1.35 s instead
of 2.33. Its price: this file, 10 s of compiling at the first use on a machine (CPU time, n = 3),
and 0.2 s of loading in each process.

By tiles is Winograd's way, F(2 x 2, 3 x 3) (Lavin & Gray, arXiv 1509.09308): a tile of 2 x 2
results comes from 4 x 4 pixels by 16 products for each pair of channels instead of 36. It adds
only sums, differences and halves, so in float32 it is as exact. One row of tiles goes through
three stages while it lies in the caches: pixels to 16 points a tile, at each point a matrix from
channels to channels, points to results. By rows is direct. The stages are emitted as vector code,
since LLVM left alone keeps neither the sums nor the intermediate values in registers.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, Signature
from math import ceil, gcd
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tune_mnist.mnist.cpu.loops import Floats, compiled

POINTS = 16  # of a tile, 4 x 4
FLOAT = 4  # bytes
LINE = 64  # bytes of a cache line

_features = binding.get_host_cpu_features()
if _features.get("avx512vl"):
    LANES, REGISTERS = 16, 32  # floats in one of the CPU's vector registers, and how many it has
elif _features.get("avx2") and _features.get("fma"):
    LANES, REGISTERS = 8, 16
else:
    LANES, REGISTERS = 0, 0  # nothing here serves

# Loops over images and rows, compiled once for each shape, whose numbers are constants in them.
# numba keeps the code on disk for as long as this file is the same: so what they call is in here.


@cache
def convolution_by_tiles(
    tiles: int, inputs: int, outputs: int, padding: int, relu: int
) -> Callable[..., None]:
    """Compile the convolution of images, padded with zeros, by filters at 16 points."""
    side, lanes, registers = 2 * tiles + 2 - 2 * padding, LANES, REGISTERS
    row_in, row_out, pixel = side * inputs * FLOAT, 2 * tiles * outputs * FLOAT, outputs * FLOAT
    point_in, point_out = tiles * inputs * FLOAT, tiles * outputs * FLOAT
    point_filter = inputs * outputs * FLOAT

    def convolution(
        x: Floats, filters: Floats, bias: Floats, out: Floats, scratch: Floats, zeros: Floats
    ) -> None:
        points = (scratch.ctypes.data + LINE - 1) // LINE * LINE
        products = points + POINTS * point_in
        bias_at, zero = bias.ctypes.data, zeros.ctypes.data
        for image in range(x.shape[0]):
            for tile in range(tiles):
                row = x.ctypes.data + (image * side + 2 * tile - padding) * row_in
                row_0, row_1, row_2, row_3 = row, row + row_in, row + 2 * row_in, row + 3 * row_in
                if padding > 0 and tile == 0:
                    row_0, row_1 = zero, zero
                if padding > 0 and tile == tiles - 1:
                    row_2, row_3 = zero, zero
                _to_points(
                    row_0, row_1, row_2, row_3, points, tiles, tiles, inputs, padding, lanes
                )
                for i in range(POINTS):
                    at, to = points + i * point_in, products + i * point_out
                    by = filters.ctypes.data + i * point_filter
                    _multiply(at, by, to, tiles, inputs, outputs, inputs, 1, 0, lanes, registers)
                to = out.ctypes.data + (image * tiles + tile) * 2 * row_out
                for column in range(tiles):
                    at = products + column * pixel
                    _from_points(at, bias_at, to, to + row_out, tiles, outputs, relu, lanes)
                    to += 2 * pixel

    return compiled(convolution)


@cache
def weight_sums_of_tiles(tiles: int, inputs: int, outputs: int) -> Callable[..., None]:
    """Compile the gradient of a weight at 16 points, [16, inputs * outputs], added to `sums`."""
    side, total, lanes, registers = 2 * tiles + 2, tiles * tiles, LANES, REGISTERS
    row_in, row_out = side * inputs * FLOAT, 2 * tiles * outputs * FLOAT
    point_in, point_out = total * inputs * FLOAT, total * outputs * FLOAT
    point_filter = inputs * outputs * FLOAT

    def weight_sums(x: Floats, gradient: Floats, sums: Floats, scratch: Floats) -> None:
        points = (scratch.ctypes.data + LINE - 1) // LINE * LINE
        gradients = points + POINTS * point_in
        for image in range(x.shape[0]):
            for tile in range(tiles):
                row = x.ctypes.data + (image * side + 2 * tile) * row_in
                row_1, row_2, row_3 = row + row_in, row + 2 * row_in, row + 3 * row_in
                to = points + tile * tiles * inputs * FLOAT
                _to_points(row, row_1, row_2, row_3, to, tiles, total, inputs, 0, lanes)
                row = gradient.ctypes.data + (image * tiles + tile) * 2 * row_out
                to = gradients + tile * tiles * outputs * FLOAT
                _gradient_to_points(row, row + row_out, to, tiles, total, outputs, lanes)
            for i in range(POINTS):
                at, by = points + i * point_in, gradients + i * point_out
                to = sums.ctypes.data + i * point_filter
                # A sum over an image before it is added: so little is lost to rounding.
                _multiply(at, by, to, inputs, total, outputs, 1, inputs, 1, lanes, registers)

    return compiled(weight_sums)


@cache
def convolution_by_rows(
    side: int, inputs: int, outputs: int, kernel: int, relu: int
) -> Callable[..., None]:
    """Compile the convolution of images by filters [kernel, kernel, inputs, outputs]."""
    rows, window, lanes, registers = side - kernel + 1, kernel * inputs, LANES, REGISTERS
    row_in, row_out = side * inputs * FLOAT, rows * outputs * FLOAT
    row_filter = window * outputs * FLOAT

    def convolution(x: Floats, filters: Floats, bias: Floats, out: Floats) -> None:
        for image in range(x.shape[0]):
            for row in range(rows):
                at = x.ctypes.data + (image * side + row) * row_in
                by = filters.ctypes.data
                to = out.ctypes.data + (image * rows + row) * row_out
                # What a filter's row covers of a row of pixels lies together.
                _multiply(at, by, to, rows, window, outputs, inputs, 1, 0, lanes, registers)
                for _ in range(1, kernel):
                    at, by = at + row_in, by + row_filter
                    _multiply(at, by, to, rows, window, outputs, inputs, 1, 1, lanes, registers)
                _finish(to, bias.ctypes.data, rows, outputs, relu, lanes)

    return compiled(convolution)


@cache
def weight_sums_of_rows(side: int, inputs: int, outputs: int, kernel: int) -> Callable[..., None]:
    """Compile the gradient of a weight, [kernel, kernel, inputs, outputs], added to `sums`."""
    rows, window, lanes, registers = side - kernel + 1, kernel * inputs, LANES, REGISTERS
    row_in, row_out = side * inputs * FLOAT, rows * outputs * FLOAT
    row_filter = window * outputs * FLOAT

    def weight_sums(x: Floats, gradient: Floats, sums: Floats) -> None:
        for image in range(x.shape[0]):
            for row in range(rows):
                by = gradient.ctypes.data + (image * rows + row) * row_out
                for i in range(kernel):
                    at = x.ctypes.data + (image * side + row + i) * row_in
                    to = sums.ctypes.data + i * row_filter
                    _multiply(at, by, to, window, rows, outputs, 1, inputs, 1, lanes, registers)

    return compiled(weight_sums)


# Vector code. An intrinsic emits LLVM's code into the loops that call it, in which its sizes are
# constants. Addresses are in bytes; everything else counts floats.


class _Vectors:
    """Emits loads, stores and sums of vectors of so many floats."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.type = ir.VectorType(ir.FloatType(), lanes)
        self.zero = ir.Constant(self.type, None)
        self.add, self.subtract = builder.fadd, builder.fsub

    def load(self, address: Any, offset: int) -> Any:
        return self.builder.load(self._pointer(address, offset, self.type), align=FLOAT)

    def store(self, vector: Any, address: Any, offset: int) -> None:
        self.builder.store(vector, self._pointer(address, offset, self.type), align=FLOAT)

    def spread(self, address: Any, offset: int) -> Any:
        """Fill a vector with one float."""
        one = self.builder.load(self._pointer(address, offset, ir.FloatType()), align=FLOAT)
        undefined = ir.Constant(self.type, ir.Undefined)
        vector = self.builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(vector, undefined, order)

    def add_product(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c."""
        kind = ir.FunctionType(self.type, [self.type] * 3)
        name = f"llvm.fma.v{self.lanes}f32"
        function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
            self.builder.module, kind, name
        )
        return self.builder.call(function, [a, b, c])

    def rectify(self, a: Any) -> Any:
        below = self.builder.fcmp_ordered("<", a, self.zero)
        return self.builder.select(below, self.zero, a)

    def _pointer(self, address: Any, offset: int, kind: Any) -> Any:
        at = self.builder.add(address, ir.Constant(address.type, offset * FLOAT))
        return self.builder.inttoptr(at, kind.as_pointer())


def _vector_code(addresses: int, sizes: int) -> Callable[[Callable[..., None]], Any]:
    """Make an intrinsic, called with addresses and then sizes, of a function that emits it."""
    called_with = [
        Parameter(f"argument_{i}", Parameter.POSITIONAL_ONLY) for i in range(1 + addresses + sizes)
    ]

    def decorate(emit: Callable[..., None]) -> Any:
        def typed(_: Any, *arguments: Any) -> Any:
            numbers = [argument.literal_value for argument in arguments[addresses:]]

            def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
                emit(builder, values[:addresses], *numbers)
                return context.get_dummy_value()

            return types.void(*[types.intp] * addresses, *arguments[addresses:]), generate

        typed.__name__ = emit.__name__
        typed.__signature__ = Signature(called_with)  # type: ignore[attr-defined]
        return intrinsic(prefer_literal=True)(typed)

    return decorate


@_vector_code(addresses=5, sizes=5)
def _to_points(
    builder: Any, at: Any, tiles: int, total: int, inputs: int, padding: int, lanes: int
) -> None:
    """Transform four rows of images, a row of tiles, to points of [16, total, inputs]."""
    *rows, points = at
    vectors = _Vectors(builder, gcd(lanes, inputs))
    width = 2 * tiles + 2
    for channel in range(0, inputs, vectors.lanes):
        columns: list[list[Any]] = []  # those of overlapping tiles are transformed once
        for tile in range(tiles):
            for x in range(len(columns), 2 * tile + 4):
                column = [vectors.zero] * 4
                if padding <= x < width - padding:
                    offset = (x - padding) * inputs + channel
                    column = [vectors.load(row, offset) for row in rows]
                columns.append(_inputs_at_points(vectors, *column))
            offset, stride = tile * inputs + channel, total * inputs
            _store_points(vectors, _inputs_at_points, columns[2 * tile :], points, offset, stride)


@_vector_code(addresses=3, sizes=4)
def _gradient_to_points(
    builder: Any, at: Any, tiles: int, total: int, outputs: int, lanes: int
) -> None:
    """Transform two rows of gradients, a row of tiles, to points of [16, total, outputs]."""
    *rows, points = at
    vectors = _Vectors(builder, gcd(lanes, outputs))
    for channel in range(0, outputs, vectors.lanes):
        for tile in range(tiles):
            columns = []
            for x in (2 * tile, 2 * tile + 1):
                column = [vectors.load(row, x * outputs + channel) for row in rows]
                columns.append(_gradients_at_points(vectors, *column))
            offset, stride = tile * outputs + channel, total * outputs
            _store_points(vectors, _gradients_at_points, columns, points, offset, stride)


@_vector_code(addresses=4, sizes=4)
def _from_points(builder: Any, at: Any, tiles: int, outputs: int, relu: int, lanes: int) -> None:
    """Transform a tile's products, the first of [16, tiles, outputs], to two rows of outputs."""
    products, bias, *rows = at
    vectors = _Vectors(builder, gcd(lanes, outputs))
    for channel in range(0, outputs, vectors.lanes):
        points = range(channel, POINTS * tiles * outputs, tiles * outputs)
        columns = [
            _outputs(vectors, *(vectors.load(products, points[4 * i + j]) for i in range(4)))
            for j in range(4)
        ]
        shift = vectors.load(bias, channel)
        for row, line in zip(rows, zip(*columns, strict=True), strict=True):
            for x, value in enumerate(_outputs(vectors, *line)):
                output = vectors.add(value, shift)
                output = vectors.rectify(output) if relu else output
                vectors.store(output, row, x * outputs + channel)


@_vector_code(addresses=2, sizes=4)
def _finish(builder: Any, at: Any, pixels: int, outputs: int, relu: int, lanes: int) -> None:
    """Add the bias to a row of results, and apply ReLU where asked for."""
    row, bias = at
    vectors = _Vectors(builder, gcd(lanes, outputs))
    for channel in range(0, outputs, vectors.lanes):
        shift = vectors.load(bias, channel)
        for offset in range(channel, pixels * outputs, outputs):
            value = vectors.add(vectors.load(row, offset), shift)
            vectors.store(vectors.rectify(value) if relu else value, row, offset)


def _store_points(
    vectors: _Vectors,
    transform: Callable[..., list[Any]],
    columns: list[list[Any]],
    points: Any,
    offset: int,
    stride: int,
) -> None:
    """Transform the lines across a tile's transformed columns, and store its 16 points."""
    lines = zip(*columns, strict=True)
    values = itertools.chain.from_iterable(transform(vectors, *line) for line in lines)
    for point, value in enumerate(values):
        vectors.store(value, points, offset + point * stride)


def _inputs_at_points(vectors: _Vectors, a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    add, subtract = vectors.add, vectors.subtract
    return [subtract(a, c), add(b, c), subtract(c, b), subtract(b, d)]


def _gradients_at_points(vectors: _Vectors, a: Any, b: Any) -> list[Any]:
    return [a, vectors.add(a, b), vectors.subtract(a, b), vectors.subtract(vectors.zero, b)]


def _outputs(vectors: _Vectors, a: Any, b: Any, c: Any, d: Any) -> list[Any]:
    add, subtract = vectors.add, vectors.subtract
    return [add(a, add(b, c)), subtract(subtract(b, c), d)]


@_vector_code(addresses=3, sizes=8)
def _multiply(builder: Any, at: Any, *sizes: int) -> None:
    """Write, or add, the product of a [rows, steps] of these strides and b [steps, columns]."""
    a, b, out = at
    rows, steps, columns, row_stride, step_stride, adds, lanes, registers = sizes
    vectors = _Vectors(builder, gcd(lanes, columns))
    width = min(2, columns // vectors.lanes)  # vectors of b at a time
    room = (registers - width - 1) // width  # rows of a whose sums stay in registers
    height = ceil(rows / ceil(rows / room))
    starts = range(0, columns, vectors.lanes)
    for first in range(0, len(starts), width):
        for row in range(0, rows, height):
            block = range(row, min(row + height, rows))
            places = list(itertools.product(block, starts[first : first + width]))
            sums = [vectors.zero] * len(places)
            with _loop(builder, steps, sums) as (step, phis):
                a_at = builder.add(a, builder.mul(step, a.type(step_stride * FLOAT)))
                b_at = builder.add(b, builder.mul(step, b.type(columns * FLOAT)))
                of_a = {r: vectors.spread(a_at, r * row_stride) for r in block}
                of_b = {c: vectors.load(b_at, c) for c in starts[first : first + width]}
                sums[:] = [
                    vectors.add_product(of_a[r], of_b[c], phi)
                    for (r, c), phi in zip(places, phis, strict=True)
                ]
            for (r, c), value in zip(places, sums, strict=True):
                offset = r * columns + c
                value = vectors.add(vectors.load(out, offset), value) if adds else value
                vectors.store(value, out, offset)


@contextmanager
def _loop(builder: Any, steps: int, values: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Emit a loop of so many steps, whose body replaces the values by the next step's."""
    before = builder.block
    body, after = builder.append_basic_block(), builder.append_basic_block()
    builder.branch(body)
    builder.position_at_end(body)
    counter = ir.IntType(64)
    step = builder.phi(counter)
    phis = [builder.phi(value.type) for value in values]
    for phi, value in zip([step, *phis], [counter(0), *values], strict=True):
        phi.add_incoming(value, before)
    yield step, phis
    following = builder.add(step, counter(1))
    for phi, value in zip([step, *phis], [following, *values], strict=True):
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, counter(steps)), body, after)
    builder.position_at_end(after)
