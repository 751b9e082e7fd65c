"""Run a search whose trials are scripted, in a process of its own that a test can kill.

PYTHONPATH=tests python -m support.scripted_search --run one --trials 20 --results-dir DIR
"""

import sys
from functools import partial

from tune_mnist import supervise

if __name__ == "__main__":
    supervise.watch("python -m tune_mnist.search --resume {}")

from ray import cloudpickle

from support import epochs, scripted
from tune_mnist.cli import run
from tune_mnist.search import search
from tune_mnist.tuning.settings import SearchSettings
from tune_mnist.tuning.worker import EpochSource


def send_scripts_to_workers() -> None:
    """Have Ray send the code of scripted trials along; workers do not have the tests' folder."""
    for module in (epochs, scripted):
        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]


def scripted_search(settings: SearchSettings, script: EpochSource) -> int:
    send_scripts_to_workers()
    return search(settings, epochs_of=script)


if __name__ == "__main__":
    sys.argv[0] = "scripted_search"
    run("search", SearchSettings, partial(scripted_search, script=scripted.Script()))
