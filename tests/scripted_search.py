"""Run a search whose trials are scripted, in a process of its own that a test can kill.

python tests/scripted_search.py --run one --trials 20 --results-dir DIR
"""

import sys
from functools import partial

import scripted
from ray import cloudpickle

from tune_mnist.cli import run
from tune_mnist.tuning.launch import search
from tune_mnist.tuning.settings import SearchSettings
from tune_mnist.tuning.worker import EpochSource


def scripted_search(settings: SearchSettings, script: EpochSource) -> int:
    # Workers do not have the tests' folder.
    cloudpickle.register_pickle_by_value(scripted)  # type: ignore[no-untyped-call]
    return search(settings, epochs_of=script)


if __name__ == "__main__":
    sys.argv[0] = "scripted_search"
    run("search", SearchSettings, partial(scripted_search, script=scripted.Script()))
