"""`bench step`: what one training step costs on one core, against the textbook recipe.

Every variant is a process of its own, as allocator and threads belong to a process. They are
asked in turns for a few steps each, so that whatever else the machine does meets all of them.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.cli import tell
from tune_mnist.errors import TuneMnistError
from tune_mnist.mnist.data import load_mnist
from tune_mnist.runs.formatting import count

VARIANTS = {
    "textbook": "DataLoader, ToTensor, Normalize, torch's modules",
    "tensors": "the same net, images in memory as tensors",
    "channels_last": "and channels last",
    "kept_memory": "and freed memory kept by the process",
    "no_numba": "ours without numba",
    "default_malloc": "ours with the C library's defaults",
    "ours": "what a trial runs, from the batch's indices to the weights",
    "conv_only": "the convolutions and the pool alone, forward and backward",
}
EVALUATIONS = ("evaluation", "textbook_evaluation")  # one pass over 15,000 images
NEEDED = ("textbook", "ours", "conv_only")
STEPS_PER_EPOCH = 430  # 55,000 images by 128


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Time the training step on one core, against the textbook recipe and the convolutions."""

    rounds: Annotated[int, Parameter(validator=Number(gte=1))] = 21
    """Turns of each variant; medians are over these."""

    steps: Annotated[int, Parameter(validator=Number(gte=1))] = 6
    """Steps in a turn."""

    quick: Annotated[bool, Parameter(negative="")] = False
    """Only the three variants that the ratios need, and fewer turns."""

    save: Path | None = None
    """Write every number to this CSV file."""

    data_dir: Path | None = None
    """Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."""


def step(settings: StepSettings) -> None:
    """Measure and print."""
    load_mnist(settings.data_dir)  # fetched once and not by each of the processes
    variants = NEEDED if settings.quick else tuple(VARIANTS)
    evaluations = EVALUATIONS[:1] if settings.quick else EVALUATIONS
    rounds = min(settings.rounds, 7) if settings.quick else settings.rounds
    tell(
        f"one thread, batches of 128, {count(rounds, 'turn')} of {count(settings.steps, 'step')} "
        "for each variant, one after the other"
    )
    taken = Measurements("step")
    with ExitStack() as stack:
        workers = {
            variant: stack.enter_context(Worker(variant, settings.data_dir))
            for variant in (*variants, *evaluations)
        }
        for turn in range(rounds):
            for variant in variants:
                found = workers[variant].measure(settings.steps)
                taken.add(variant, "step_ms", found["ms"])
                taken.add(variant, "page_faults", found["faults"])
            if turn < max(1, rounds // 4):
                for variant in evaluations:
                    found = workers[variant].measure(1)
                    taken.add(variant, "evaluation_s", found["ms"] / 1e3)
    for variant in variants:
        tell(f"{variant:<16} {VARIANTS[variant]}")
    taken.finish(_keys(taken), settings.save)


def _keys(taken: Measurements) -> dict[str, Any]:
    textbook, ours, conv_only = (taken.median(name, "step_ms") for name in NEEDED)
    evaluation = taken.median("evaluation", "evaluation_s")
    return {
        "textbook_ms": textbook,
        "ours_ms": ours,
        "conv_only_ms": conv_only,
        "speedup": textbook / ours,
        "over_conv": ours / conv_only,
        "evaluation_s": evaluation,  # 15,000 images
        "textbook_evaluation_s": taken.median("textbook_evaluation", "evaluation_s"),
        "evaluation_share": evaluation / (evaluation + STEPS_PER_EPOCH * ours / 1e3),
        "n": len(taken.values("ours", "step_ms")),
    }


class Worker:
    """A process that takes steps of one variant when asked to."""

    def __init__(self, variant: str, data_dir: Path | None) -> None:
        arguments = [variant] if data_dir is None else [variant, str(data_dir)]
        self._variant = variant
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tune_mnist.benchmarks.step_variants", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def measure(self, steps: int) -> dict[str, float]:
        """Return what a step took, on average, of so many."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            found: dict[str, float] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, ValueError) as error:
            raise TuneMnistError(
                f"the process of {self._variant} ended; its message is above"
            ) from error
        return found
