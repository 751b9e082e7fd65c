"""Measure what tune_mnist costs, part by part: a table, then one line of JSON.

python -m tune_mnist.bench step --quick     the training step on one core
python -m tune_mnist.bench --help           all parts
"""

from importlib import import_module
from typing import Any

from tune_mnist.benchmarks import settings
from tune_mnist.cli import Command, run_one_of
from tune_mnist.supervise import interrupt, stops

PARTS: dict[str, type[Any]] = {
    "step": settings.StepSettings,
    "turnaround": settings.TurnaroundSettings,
    "peers": settings.PeersSettings,
    "pack": settings.PackSettings,
    "cluster": settings.ClusterSettings,
    "gpu": settings.GpuSettings,
    "curves": settings.CurvesSettings,
    "replay": settings.ReplaySettings,
}


def command(part: str) -> Command[Any]:
    """Return the command that runs a part: the function of its name in the module of its name."""

    def run(given: Any) -> None:
        # Imported here: torch and Ray take seconds, which --help and a typo need not wait for.
        module = import_module(f"tune_mnist.benchmarks.{part}")
        with stops.acting(interrupt):  # else what is being measured would stay behind
            getattr(module, part)(given)

    return Command(PARTS[part], run)


if __name__ == "__main__":
    run_one_of(
        "bench",
        "Measure what tune_mnist costs, part by part. A part takes minutes, --quick less.",
        {part: command(part) for part in PARTS},
    )
