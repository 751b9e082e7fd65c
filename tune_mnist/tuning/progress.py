"""What a person sees while a search runs."""

from typing import Any

from ray.tune import Callback

from tune_mnist.analysis.run import RunFolder
from tune_mnist.tuning.experiment import Experiment


class Progress(Callback):  # type: ignore[misc]
    """Shows a search's course."""

    def watch(self, experiment: Experiment, folder: RunFolder) -> None:
        """Begin to show a search."""

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Show where the search stands."""
