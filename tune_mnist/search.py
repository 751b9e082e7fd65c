"""Search for good hyperparameters.

python -m tune_mnist.search                                 50 trials of the default space
python -m tune_mnist.search --space quick --images 6000 --time-budget 5m
python -m tune_mnist.search --resume results/default-20261123-101500
"""

from tune_mnist.cli import run
from tune_mnist.tuning.launch import search
from tune_mnist.tuning.settings import SearchSettings

if __name__ == "__main__":
    run("search", SearchSettings, search)
