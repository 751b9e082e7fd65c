"""trials.csv and best.csv: what a search found, as tables that people read."""

from tune_mnist.analysis.history import History, Metric
from tune_mnist.analysis.run import RunFolder


def write_tables(folder: RunFolder, history: History, metric: Metric) -> None:
    """Write trials.csv and best.csv.

    Raises:
        OSError: they could not be written; the older ones are untouched.
    """
