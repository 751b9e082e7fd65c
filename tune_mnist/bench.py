"""Measure what tune_mnist costs, part by part: a table, then one line of JSON.

python -m tune_mnist.bench step             the training step on one core
python -m tune_mnist.bench turnaround       from trial to trial, and what a report costs
python -m tune_mnist.bench peers            one search against Ray's recipe, Optuna, Syne Tune
python -m tune_mnist.bench pack             how many trials at once serve best
python -m tune_mnist.bench cluster          how many reports a second one driver takes in
python -m tune_mnist.bench gpu              an epoch on a GPU, captured or not, by precision
python -m tune_mnist.bench curves           record learning curves, an hour and more
python -m tune_mnist.bench replay           searches on recorded curves, ours and others
"""

import signal
import sys

from tune_mnist.benchmarks.cluster import ClusterSettings, cluster
from tune_mnist.benchmarks.curves import CurvesSettings, curves
from tune_mnist.benchmarks.gpu import GpuSettings, gpu
from tune_mnist.benchmarks.pack import PackSettings, pack
from tune_mnist.benchmarks.peers import PeersSettings, peers
from tune_mnist.benchmarks.replay import ReplaySettings, replay
from tune_mnist.benchmarks.step import StepSettings, step
from tune_mnist.benchmarks.turnaround import TurnaroundSettings, turnaround
from tune_mnist.cli import Command, run_one_of

if __name__ == "__main__":
    # What is being measured ends with us.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    run_one_of(
        "bench",
        "Measure what tune_mnist costs, part by part. A part takes minutes, --quick less.",
        {
            "step": Command(StepSettings, step),
            "turnaround": Command(TurnaroundSettings, turnaround),
            "peers": Command(PeersSettings, peers),
            "pack": Command(PackSettings, pack),
            "cluster": Command(ClusterSettings, cluster),
            "gpu": Command(GpuSettings, gpu),
            "curves": Command(CurvesSettings, curves),
            "replay": Command(ReplaySettings, replay),
        },
    )
