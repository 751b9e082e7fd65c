"""Search for good hyperparameters.

python -m tune_mnist.search                                 50 trials of the default space
python -m tune_mnist.search --space quick --images 6000 --time-budget 5m
python -m tune_mnist.search --resume results/default-20261123-101500
"""

from typing import TYPE_CHECKING

from tune_mnist import supervise

if __name__ == "__main__":  # before the imports: the parent needs none of them
    supervise.watch("python -m tune_mnist.search --resume {}")

from tune_mnist.cli import outlive_output, run
from tune_mnist.tuning.settings import SearchSettings

if TYPE_CHECKING:
    from tune_mnist.tuning.worker import EpochSource


def search(settings: SearchSettings, epochs_of: "EpochSource | None" = None) -> int:
    if settings.list_runs:
        from rich.console import Console

        from tune_mnist.reporting.summary import Listing

        Console().print(Listing(settings.results_dir), crop=False)
        return 0
    # Imported here: Ray takes two seconds, which --help and a mistyped option need not wait for.
    from tune_mnist.tuning import launch

    outlive_output()
    return launch.search(settings.resuming(supervise.run_to_resume), epochs_of)


if __name__ == "__main__":
    run("search", SearchSettings, search)
