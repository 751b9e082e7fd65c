"""Numbers that a benchmark has measured: a table for people, rows for a CSV, one line of JSON.

A number is only ever shown as the median of n with the quartiles beside it.
"""

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError
from tune_mnist.runs.files import write_output

_KEY = ["subject", "quantity"]


@dataclass
class Measurements:
    """All numbers of one part of the benchmark, in the order they were measured.

    Each is of a subject (a variant, a system, a packing) and of a quantity, whose name holds the
    unit, such as step_ms.
    """

    part: str
    samples: list[tuple[str, str, float]] = field(default_factory=list)

    def add(self, subject: str, quantity: str, *values: float) -> None:
        self.samples += [(subject, quantity, float(value)) for value in values]

    def values(self, subject: str, quantity: str) -> list[float]:
        return [value for *key, value in self.samples if key == [subject, quantity]]

    def median(self, subject: str, quantity: str) -> float:
        """Return the median, NaN where nothing was measured."""
        values = self.values(subject, quantity)
        return statistics.median(values) if values else math.nan

    def medians(self, subjects: Iterable[str], quantity: str) -> dict[str, float]:
        return {subject: self.median(subject, quantity) for subject in subjects}

    def table(self) -> str:
        """Return a line for each subject and quantity: median, quartiles, n."""
        lines = [f"{'':<34} {'':<24} {'median':>10} {'quartiles':>21} {'n':>6}"]
        for (subject, quantity), values in self._frame().groupby(_KEY, sort=False)["value"]:
            low, middle, high = map(_short, values.quantile([0.25, 0.5, 0.75]))
            lines.append(
                f"{subject:<34} {quantity:<24} {middle:>10} {low:>10} {high:>10} {len(values):>6}"
            )
        return "\n".join(lines)

    def csv(self) -> str:
        """Return all numbers, one a row, counted within their subject and quantity."""
        frame = self._frame()
        frame.insert(0, "part", self.part)
        frame.insert(3, "round", frame.groupby(_KEY).cumcount())
        return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")

    def _frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.samples, columns=[*_KEY, "value"])

    def finish(self, keys: Mapping[str, Any], save: Path | None, table: str | None = None) -> None:
        """Print the table, this one or `self.table()`; write the CSV if asked; print JSON last."""
        tell(table or self.table())
        if save is not None:
            write_file(save, self.csv())
        line = {"part": self.part, **keys, "machine": describe_machine()}
        tell(json.dumps(_plain(line), allow_nan=False))


def write_file(path: Path, content: str) -> None:
    """Write the file that --save names, or raise ConfigError."""
    try:
        write_output(path, content)
    except OSError as error:
        raise ConfigError(f"--save: cannot write {path} ({error.strerror})") from error


def _plain(value: Any) -> Any:
    """Return what JSON can hold, numbers with four significant digits, null for NaN."""
    match value:
        case float():
            return float(f"{value:.4g}") if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case _:
            return value


def describe_machine() -> str:
    """Return the processor's model and the number of usable cores."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has this file
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            model = found[1].strip()
    return f"{model}, {usable_cores()} cores"


def usable_cores() -> int:
    # macOS has no affinity.
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(affinity) or os.cpu_count() or 1


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
