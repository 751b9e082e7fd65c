"""Hyperparameter search for a small MNIST conv net with Ray Tune, Optuna and ASHA.

net = tune_mnist.load("results/default")    # the best trial's, ready for inference
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tune_mnist.mnist.net import Net

__all__ = ["load"]
__version__ = "0.1.0"  # here, as a cluster may have the code without its being installed

if sys.argv[:1] == ["-m"]:  # of `python -m`, while Python looks for the front door
    from tune_mnist import supervise

    supervise.begin()


def load(run: str | os.PathLike[str]) -> Net:
    """Return the net of a search's best trial, on the CPU and ready for inference.

    `run` is the search's folder, or the file of a model; without one, ConfigError is raised. The
    net maps images float32 [B, 1, 28, 28], light on dark, to log-probabilities [B, 10]:

        from tune_mnist.mnist.images import normalised, scaled
        digits = net(normalised(scaled(images))).argmax(1)      # of images uint8 [B, 28, 28]
    """
    # Not above: whoever imports the package may not need torch, which takes seconds.
    from tune_mnist.locations import user_path
    from tune_mnist.mnist.checkpoint import load_model
    from tune_mnist.runs.files import read_plain

    path = user_path(str(run))
    # In a run's folder no link is followed, but a user may name one.
    model = path / "best.pt" if path.is_dir() else Path(os.path.realpath(path))
    return load_model(model, read_plain).net
