"""Ray Tune with its own OptunaSearch and ASHA, wired as documented, on known curves."""

import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

EPOCHS = 5


def trainable(config: Mapping[str, Any], notes: Path) -> None:
    """Report accuracies that the configuration names, and save a checkpoint with each."""
    start = 0
    if (checkpoint := tune.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            start = int((Path(folder) / "epoch").read_text())
    for epoch in range(start + 1, EPOCHS + 1):
        if config["hangs"] and not (notes / "restored").exists():
            time.sleep(3600)
        with (notes / "epochs").open("a") as file:
            file.write(f"{config['accuracy']:g} {epoch}\n")
        accuracy = config["accuracy"] + epoch / 100
        if config["accuracy"] == 0.7 and epoch > 1:
            accuracy = math.nan
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "epoch").write_text(str(epoch))
            tune.report({"accuracy": accuracy}, checkpoint=tune.Checkpoint.from_directory(folder))


def plain_search(output: Path, address: str, path: Path, points: list[dict[str, Any]]) -> None:
    _begin(output, address)
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "0"  # kinder than the default, 10 s and more
    storage = optuna.storages.RDBStorage(f"sqlite:///{path / 'study.db'}")
    searcher = OptunaSearch(
        {
            "accuracy": optuna.distributions.FloatDistribution(0, 1),
            "hangs": optuna.distributions.CategoricalDistribution([False, True]),
        },
        metric="accuracy",
        mode="max",
        points_to_evaluate=points,
        storage=storage,
        study_name="plain",
    )
    tune.Tuner(
        _trainable(path),
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            search_alg=searcher,
            scheduler=ASHAScheduler(max_t=EPOCHS, grace_period=1, reduction_factor=3),
            num_samples=len(points),
            max_concurrent_trials=1,
        ),
        run_config=tune.RunConfig(name="plain", storage_path=str(path)),
    ).fit()


def plain_restore(output: Path, address: str, path: Path) -> None:
    _begin(output, address)
    tune.Tuner.restore(str(path / "plain"), _trainable(path), resume_unfinished=True).fit()


def _trainable(path: Path) -> Any:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # type: ignore[no-untyped-call]
    return tune.with_parameters(trainable, notes=path)


def _begin(output: Path, address: str) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    ray.init(address=address, log_to_driver=False)
