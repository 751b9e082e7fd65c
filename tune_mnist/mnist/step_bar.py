"""The bar that shows an epoch's steps: the loss, how many, how fast."""

import shutil
import sys
import time
from typing import TYPE_CHECKING

from tqdm import tqdm  # type: ignore[import-untyped]

from tune_mnist.cli import tell

if TYPE_CHECKING:
    from torch import Tensor

DRAW_EVERY = 0.1  # seconds


class _Bar(tqdm):  # type: ignore[misc]
    def __del__(self) -> None:
        """Do not close: StepBar does, and Ctrl-C may have kept this one from being finished."""


class StepBar:
    """The progress of an epoch: a live bar on a terminal, elsewhere one line when it has ended."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> None:
        self.done = 0
        self.prefix = ""
        self.began = self.drawn = time.perf_counter()
        self.bar = None
        if sys.stdout.isatty():
            # Told its size: a container's terminal may say 0 x 0, where tqdm would draw nothing.
            self.bar = _Bar(total=self.steps, file=sys.stdout, ncols=columns(), nrows=2)

    def step(self, number: int, loss: "Tensor") -> None:
        """Take note of a step (1-based) and its loss."""
        self.done = number
        now = time.perf_counter()
        last = number == self.steps
        # Looking at the loss waits for a GPU: only as often as an eye can follow.
        if last or now - self.drawn >= DRAW_EVERY:
            self.drawn = now
            self.prefix = f"Loss={loss.item():.4f} batch_id={number - 1}"
            if self.bar is not None:
                self.bar.n, self.bar.ncols = number, columns()
                self.bar.set_description(self.prefix)
        if last:
            self._finish()  # now and not after the evaluation, which is none of the epoch's steps

    def _finish(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.prefix:
            elapsed = time.perf_counter() - self.began
            tell(
                tqdm.format_meter(
                    self.done, self.steps, elapsed, prefix=self.prefix, ncols=100, ascii=True
                )
            )

    def __exit__(self, *exception: object) -> None:
        if self.done < self.steps:  # diverged or interrupted
            self._finish()


def columns() -> int:
    """Return the terminal's present width."""
    return shutil.get_terminal_size().columns
