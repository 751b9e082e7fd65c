"""How numbers, configurations and paths are written where people read them."""

import math
from pathlib import Path

from tune_mnist.mnist.config import TrainConfig


def percent(fraction: float) -> str:
    """Return an accuracy as `99.18%`; 10,000 images resolve no more digits."""
    return f"{fraction:.2%}" if math.isfinite(fraction) else "-"


def points(gain: float) -> str:
    """Return a difference of accuracies in percentage points: `+0.41`."""
    return f"{100 * gain:+.2f}" if math.isfinite(gain) else "-"


def duration(seconds: float) -> str:
    """Return a time: `42 s`, `3 min 20 s`, `10 min`, `1 h 05 min`, `no limit`."""
    if not math.isfinite(seconds):
        return "no limit"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60:02d} s" if whole % 60 else "")
    minutes = whole % 3600 // 60
    return f"{whole // 3600} h" + (f" {minutes:02d} min" if minutes else "")


def count(number: int, noun: str) -> str:
    """Return `1 epoch`, `2 epochs`, `55,000 images`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def setting(config: TrainConfig, name: str) -> str:
    """Return a hyperparameter's value, or `-` if it has no effect in this configuration."""
    if not config.uses(name):
        return "-"
    match getattr(config, name):
        case bool(value):
            return "yes" if value else "no"
        case float(value):
            return f"{value:.3g}"
        case value:
            return str(value)


def differences(config: TrainConfig, baseline: TrainConfig) -> str:
    """Return where a configuration differs from the baseline: `adamw, lr 0.0031`."""
    parts = []
    for name, value in config.as_dict().items():
        shown = setting(config, name)
        if value == getattr(baseline, name) or shown == "-":
            continue
        if isinstance(value, bool):
            parts.append(name if value else f"no {name}")
        else:
            parts.append(shown if isinstance(value, str) else f"{name} {shown}")
    return ", ".join(parts) or "as the baseline"


def short_path(path: Path) -> str:
    """Return a path below the current folder as relative to it, any other path unchanged."""
    absolute, here = path.absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)
