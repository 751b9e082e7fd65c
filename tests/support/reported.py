"""Runs to report on, of every kind, recorded as searches record them."""

import random
from pathlib import Path
from typing import Any

from support.recorded import RecordedSearch

EVIL = (
    "</script><script>document.title='pwned'</script>"
    "<img src=x onerror=\"document.title='pwned'\">"
)
SPACE = {
    "epochs": 9,
    "parameters": {
        "optimizer": {"choices": ["sgd", "adamw"]},
        "lr": {"low": 1e-3, "high": 0.2, "log": True},
        "momentum": {"low": 0.5, "high": 0.99, "when": {"optimizer": "sgd"}},
        "nesterov": {"choices": [False, True], "when": {"optimizer": "sgd"}},
        "dropout": {"low": 0.0, "high": 0.3},
    },
    "start": [],
}


def empty(path: Path, name: str, **asked: Any) -> RecordedSearch:
    """A search that has started no trial yet."""
    search = RecordedSearch(path, name)
    write_search(search, **asked)
    return search


def write_search(search: RecordedSearch, space: Any = SPACE, **asked: Any) -> None:
    """Write a run's search.yaml, with this space in it."""
    settings = {"metric": "val_accuracy", "trials": 20, "epochs": 9, "time_budget": None}
    settings |= {"images": None, "grace_epochs": 1, "reduction_factor": 3.0, "seed": 0}
    content = {
        "asked": settings | asked,
        "space_name": "default",
        "space_source": "/somewhere/search_spaces/default.yaml",
        "space": space,
        "versions": {"tune_mnist": "0.1.0", "ray": "2.60.0"},
        "machine": {"host": "here", "cpus": 2},
    }
    search.folder.write_search(content)


def rich(
    path: Path, name: str = "rich", trials: int = 24, end: str = "finished"
) -> RecordedSearch:
    """A search in which everything happened that can."""
    search = empty(path, name)
    draw = random.Random(7)
    search.trial(curve(0.985, 9))
    for _ in range(trials - 4):
        lr = 10 ** draw.uniform(-3, -0.8)
        top = 0.992 - 0.03 * abs(lr - 0.03) - draw.uniform(0, 0.004)
        epochs = draw.choice([1, 3, 9, 9])
        values: dict[str, Any] = {"lr": lr, "dropout": draw.uniform(0, 0.3)}
        values |= {"momentum": draw.uniform(0.5, 0.99)} if draw.random() < 0.7 else {}
        search.trial(
            curve(top, epochs),
            state="complete" if epochs == 9 else "stopped",
            optimizer="sgd" if "momentum" in values else "adamw",
            **values,
        )
    diverging = search.start(lr=0.19)
    search.epoch(diverging, 0.5)
    search.diverged_epoch(diverging)
    search.end(diverging, "diverged", "the loss was not finite at step 33 of epoch 2")
    search.trial([0.9], state="failed", reason=f"the worker died {EVIL}", lr=0.02)
    search.epoch(search.start(lr=0.05), 0.97)
    if end:
        search.history.close_session(end, search.clock)
    search.history.close()
    return search


def all_failed(path: Path, name: str = "all-failed") -> RecordedSearch:
    search = empty(path, name)
    for _ in range(3):
        search.trial([], state="failed", reason="no luck")
    search.history.close_session("failed", search.clock)
    return search


def curve(top: float, epochs: int) -> list[float]:
    """Accuracies that rise to about `top`."""
    return [top - 0.05 / epoch**1.5 for epoch in range(1, epochs + 1)]
