"""What a worker is told to do; apart, so that workers load nothing that only the driver needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_mnist.analysis.history import Metric


@dataclass(frozen=True)
class Assignment:
    """Train this, from here on."""

    number: int
    config: Mapping[str, Any]
    seed: int
    epochs: int
    metric: Metric
    state: bytes | None  # None: from the start

    def __repr__(self) -> str:  # Tune puts configurations into folder names and logs
        return f"trial {self.number}"
