"""Numbers that a benchmark has taken: a table for people, rows for a CSV, one line of JSON.

A number is only ever shown as the median of n with the quartiles beside it.
"""

import csv
import io
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError
from tune_mnist.runs.files import replace_file

COLUMNS = ("part", "subject", "quantity", "round", "value")


@dataclass(frozen=True)
class Sample:
    """One measured number."""

    subject: str  # what was measured: a variant, a system, a packing
    quantity: str  # with its unit, such as step_ms
    round: int  # 0-based turn of the subject
    value: float


@dataclass
class Measurements:
    """All numbers of one part of the benchmark."""

    part: str
    samples: list[Sample] = field(default_factory=list)

    def add(self, subject: str, quantity: str, *values: float) -> None:
        """Take in one or more numbers, each a turn of its own."""
        first = len(self.values(subject, quantity))
        for turn, value in enumerate(values, start=first):
            self.samples.append(Sample(subject, quantity, turn, float(value)))

    def values(self, subject: str, quantity: str) -> list[float]:
        """Return what was measured, in order."""
        return [
            sample.value
            for sample in self.samples
            if (sample.subject, sample.quantity) == (subject, quantity)
        ]

    def median(self, subject: str, quantity: str) -> float:
        """Return the middle value, NaN where nothing was measured."""
        values = self.values(subject, quantity)
        return statistics.median(values) if values else math.nan

    def table(self) -> str:
        """Draw one line for each subject and quantity: median, quartiles, n."""
        lines = [f"{'':<34} {'':<24} {'median':>10} {'quartiles':>21} {'n':>6}"]
        keys = dict.fromkeys((sample.subject, sample.quantity) for sample in self.samples)
        for subject, quantity in keys:
            values = self.values(subject, quantity)
            low, high = quartiles(values)
            lines.append(
                f"{subject:<34} {quantity:<24} {_short(statistics.median(values)):>10} "
                f"{_short(low):>10} {_short(high):>10} {len(values):>6}"
            )
        return "\n".join(lines)

    def csv(self) -> str:
        """Return all numbers, one a row."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for each in self.samples:
            writer.writerow(
                (self.part, each.subject, each.quantity, each.round, f"{each.value:.6g}")
            )
        return file.getvalue()

    def finish(self, keys: Mapping[str, Any], save: Path | None) -> None:
        """Print the table and, last, the line of JSON; keep the numbers where that was asked."""
        tell(self.table())
        if save is not None:
            write_file(save, self.csv())
        tell(json_line({"part": self.part, **keys, "machine": describe_machine()}))


def write_file(path: Path, content: str) -> None:
    """Write a file the user named.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        replace_file(path, content)
    except OSError as error:
        raise ConfigError(f"--save: cannot write {path} ({error.strerror})") from error


def json_line(keys: Mapping[str, Any]) -> str:
    """Write values on one line of JSON, four significant digits each, null for NaN."""
    return json.dumps({key: _plain(value) for key, value in keys.items()}, allow_nan=False)


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of a single value, that value twice."""
    known = sorted(values)
    if len(known) < 2:
        return known[0], known[0]
    low, _, high = statistics.quantiles(known, n=4, method="inclusive")
    return low, high


def describe_machine() -> str:
    """Name the processor and its cores."""
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    for line in text.splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {usable_cores()} cores"


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    # Not everywhere known: macOS has no affinity.
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return len(affinity) or os.cpu_count() or 1


def _plain(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.4g}") if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case _:
            return value


def _short(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
