"""What a GPU adds to a training step: graphs, precision, timing, and a workspace to share.

A step starts some 170 kernels, more slowly than the GPU runs them. `captured` records them once as
a CUDA graph and starts them as one. Within an epoch nothing waits for the device.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_mnist.mnist.checkpoint import State, put_state
from tune_mnist.mnist.config import Precision
from tune_mnist.mnist.data import Split
from tune_mnist.mnist.forward import training_forward
from tune_mnist.mnist.images import SplitTensors
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.step import Step, StepKind, Take

_WARM_UP = 3  # torch's own advice: what only first times do is done before the recording
_MOST_STEPS = 16  # kept prepared; a search of the default space has four kinds


def captured(step: Step, sizes: Iterable[int], pool: Any) -> Take:
    """Record a step as a CUDA graph for batches of each size; return what replays it.

    The step is really taken a few times on the way, so its state must be put afterwards. A loss
    that the result returns is valid until the next step. `pool`, `torch.cuda.graph_pool_handle()`,
    is memory that may be shared by graphs that never run at the same time.
    """
    row = torch.zeros(len(step.columns), device=step.net.vector.device)
    batches = {size: torch.zeros(size, dtype=torch.int64, device=row.device) for size in sizes}
    replays = {
        size: capture(partial(step.take, batch, row), step.generator, pool)
        for size, batch in batches.items()
    }

    def take(batch: Tensor, values: Tensor) -> Tensor:
        batches[len(batch)].copy_(batch)
        row.copy_(values)
        return replays[len(batch)]()

    return take


def capture(
    work: Callable[[], Tensor], generator: torch.Generator, pool: Any
) -> Callable[[], Tensor]:
    """Record some work as a CUDA graph; return what replays it and returns its result.

    The work waits for nothing, on tensors that stay where they are. What it draws from the
    generator continues, at each replay, from the generator's state.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        # Later versions of torch see by themselves what is drawn from, and warn.
        warnings.filterwarnings("ignore", message=".*register_generator_state")
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, pool=pool):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class StepKey(NamedTuple):
    """What two runs must agree in to use the same prepared step."""

    kind: StepKind
    batch_size: int
    precision: Precision
    captured: bool  # as a CUDA graph, else done operation by operation


@dataclass
class Prepared:
    """A step on the device, ready to be taken."""

    step: Step
    take: Take
    state: State | None = None  # what lies in it, if it is the state of a run


class Workspace:
    """Images on a device and the steps prepared for them; one run at a time uses it.

    It belongs to the process and outlives the runs, so a step is captured once. A run is in here
    within an epoch only; between two epochs it is in its state.
    """

    def __init__(self, split: Split, device: str) -> None:
        self.data = SplitTensors.on(split, device, copy=True)
        self._split = split  # whose images lie there
        self._lock = Lock()
        self._generator = torch.Generator(device)
        on_gpu = self.data.device.type == "cuda"
        self._pool: Any = torch.cuda.graph_pool_handle() if on_gpu else None
        self._steps: dict[StepKey, Prepared] = {}

    @classmethod
    def on(cls, device: str, split: Split) -> "Workspace":
        """Return the process's workspace on a device, a new one where the split does not fit."""
        if device in _workspaces and not _workspaces[device].data.fits(split):
            del _workspaces[device]  # frees its memory first
        if device not in _workspaces:
            _workspaces[device] = cls(split, device)
        return _workspaces[device]

    @contextmanager
    def lend(self, key: StepKey, split: Split, state: State) -> Iterator[Prepared]:
        """Provide a step that holds a run's images and state.

        The run stores its new state there after an epoch. If it does not, the epoch was broken
        off, and the next one starts from a state again.
        """
        with self._lock, products_in("float32"):
            prepared = self._step(key)
            if self._split is not split:
                self.data.fill(split)
                self._split = split
            if prepared.state is not state:
                put_state(state, prepared.step)
            prepared.state = None
            yield prepared

    def _step(self, key: StepKey) -> Prepared:
        prepared = self._steps.pop(key, None)
        if prepared is None and len(self._steps) == _MOST_STEPS:
            del self._steps[next(iter(self._steps))]  # the one not used for longest
        self._steps[key] = prepared or self._prepare(key)
        return self._steps[key]

    def _prepare(self, key: StepKey) -> Prepared:
        forward = bfloat16_forward if key.precision == "bf16" else training_forward
        step = Step(key.kind, self.data, self._generator, forward, known={})
        if not key.captured:
            return Prepared(step, products_in(key.precision)(step.take))
        whole, rest = divmod(len(self.data.train_labels), key.batch_size)
        # The last batch, where it is smaller: batch norm's statistics must be its own.
        sizes = [key.batch_size] * (whole > 0) + [rest] * (rest > 0)
        with products_in(key.precision):
            return Prepared(step, captured(step, sizes, self._pool))


_workspaces: dict[str, Workspace] = {}  # of the process, by device


def bfloat16_forward(
    net: Net, images: Tensor, dropout: float | Tensor, generator: torch.Generator
) -> Tensor:
    """Compute `training_forward` in bfloat16, where torch's autocast does so."""
    # A captured graph must round the weights anew at each replay: none are kept rounded.
    with torch.autocast(images.device.type, dtype=torch.bfloat16, cache_enabled=False):
        return training_forward(net, images, dropout, generator)


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Have CUDA compute float32 convolutions and products as they are, or rounded to TF32."""
    cudnn: Any = torch.backends.cudnn  # whose `conv` its type lacks
    settings = (cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:  # torch's own default is TF32 for convolutions
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def fetch(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Copy vectors to the CPU in one go, after all that the device was given is done."""
    copied = torch.cat(list(vectors)).to("cpu", non_blocking=True)
    if vectors[0].device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    return [part.clone() for part in torch.split(copied, [len(vector) for vector in vectors])]


class Stopwatch:
    """Takes times on a device, which may run behind the host."""

    def __init__(self, device: str) -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._marks: list[Any] = []
        self.lap()

    def lap(self) -> None:
        mark: Any = time.perf_counter()
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
        self._marks.append(mark)

    def seconds(self) -> list[float]:
        """Return the length of each lap; on a GPU only after waiting for it."""
        pairs = pairwise(self._marks)
        if self._on_gpu:
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return [end - begin for begin, end in pairs]
