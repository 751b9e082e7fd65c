"""Search for good hyperparameters.

python -m tune_mnist.search                                 50 trials of the default space
python -m tune_mnist.search --space quick --images 6000 --time-budget 5m
python -m tune_mnist.search --resume results/default-20261123-101500
"""

from tune_mnist.cli import run
from tune_mnist.tuning.settings import SearchSettings


def search(settings: SearchSettings) -> int:
    # Imported here: Ray takes two seconds, which --help and a mistyped option need not wait for.
    from tune_mnist.tuning import launch

    return launch.search(settings)


if __name__ == "__main__":
    run("search", SearchSettings, search)
