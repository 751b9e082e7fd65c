"""What a search was asked, resolved: the contents of `search.yaml`."""

import hashlib
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import tune_mnist
from tune_mnist.errors import RunFolderError, TuneMnistError
from tune_mnist.locations import storage_uri
from tune_mnist.mnist.config import Precision
from tune_mnist.runs.folder import RunFolder, damaged
from tune_mnist.runs.history import History
from tune_mnist.runs.space import SearchSpace, load_space
from tune_mnist.runs.view import read_search
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.settings import SearchOptions, SearchSettings

DEFAULT_TRIALS = 50
CONFIRMING = 0.5  # of a time budget: what --confirm may use of it
_OPTIONS = tuple(entry.name for entry in fields(SearchOptions))
_MAY_BE_NONE = ("time_budget", "images")  # no limit, all of them
_BESIDE_RULES = ("storage", "confirm", "precision")  # a plan's other fields
_COMPARED_BY = ("metric", "epochs", "images")
_PACKAGES = ("torch", "torchvision", "ray", "optuna", "pandas", "numpy")


@dataclass(frozen=True)
class Plan:
    """The rules of a search and what surrounds it."""

    rules: Rules
    storage: str | None = None  # the URI of the folder that holds a copy of the run
    confirm: bool = False  # whether the winners are confirmed at the end, in the time budget
    precision: Precision = "float32"

    @property
    def search_rules(self) -> Rules:
        """The rules of the search proper: its time is what is not kept for confirming."""
        if not self.confirm or self.rules.time_budget is None:
            return self.rules
        return replace(self.rules, time_budget=(1 - CONFIRMING) * self.rules.time_budget)

    @classmethod
    def of(cls, settings: SearchSettings) -> Self:
        """Resolve a new search's settings, or raise SearchSpaceError."""
        space = load_space(settings.space)
        asked = {name: getattr(settings, name) for name in _OPTIONS}
        asked["trials"] = settings.trials or DEFAULT_TRIALS
        asked["epochs"] = settings.epochs or space.epochs
        return cls(Rules(space=space, **asked)).changed_by(settings)

    @classmethod
    def load(cls, folder: RunFolder) -> Self:
        """Read the plan of a run, or raise RunFolderError if its search.yaml is damaged."""
        file = read_search(folder)
        try:
            if unknown := folder.read_search()["asked"].keys() - set(_OPTIONS):
                raise ValueError(f"asked.{min(unknown, key=str)} is not known to this version")
            asked: dict[str, Any] = {name: getattr(file.asked, name) for name in _OPTIONS}
            for name, value in asked.items():
                if value is None and name not in _MAY_BE_NONE:
                    raise ValueError(f"asked.{name} is missing")
            if file.storage is not None:
                storage_uri(file.storage)
            space = SearchSpace.from_dict(file.space, file.space_name, file.space_source)
            # Older versions did not write all of these.
            around = {name: getattr(file, name) for name in _BESIDE_RULES}
            return cls(Rules(space=space, **asked), **around)
        except ValueError as error:
            raise damaged(folder.search, error) from error

    def changed_by(self, settings: SearchSettings) -> Self:
        """Return the plan with what a resume may change: trials, time, storage, ..."""
        rules = replace(
            self.rules,
            trials=settings.trials or self.rules.trials,
            time_budget=settings.time_budget or self.rules.time_budget,
        )
        return replace(
            self,
            rules=rules,
            storage=storage_uri(settings.storage) if settings.storage else self.storage,
            confirm=self.confirm or settings.confirm,
            precision=settings.precision or self.precision,
        )

    def save(self, folder: RunFolder) -> None:
        asked = {name: getattr(self.rules, name) for name in _OPTIONS}
        space = self.rules.space
        folder.write_search(
            {
                "asked": {name: None if v == math.inf else v for name, v in asked.items()},
                **{name: getattr(self, name) for name in _BESIDE_RULES},
                "space_name": space.name,
                # In full: a search may be resumed from another folder.
                "space_source": str(Path(space.source).absolute()),
                "space": space.as_dict(),
                "versions": versions(),
                "machine": machine(),
            }
        )

    def save_around_rules(self, folder: RunFolder) -> None:
        """Save the storage and the like of a run in which nothing is trained."""
        before = folder.read_search()
        now = before | {name: getattr(self, name) for name in _BESIDE_RULES}
        if now != before:
            folder.write_search(now)

    def check_comparable(self, folder: RunFolder, history: History) -> None:
        """Raise RunFolderError if its search.yaml was changed in what epochs are compared by."""
        then, now = history.asked, self.rules.lasting
        changed = [name for name in _COMPARED_BY if then and then.get(name) != now[name]]
        if history.rows and changed:
            name = changed[0]
            raise RunFolderError(
                f"{folder.search}: {name} was {then.get(name)} when its trials were trained, is "
                f"now {now[name]}: they could not be compared; put it back, or start a new search"
            )

    def differences(self, folder: RunFolder, history: History) -> list[str]:
        """Return what changed since the last session: versions, code, search.yaml, space file."""
        found = compare(read_search(folder).versions, versions())
        now = self.rules.lasting
        found += [
            f"{folder.search}: {change}" for change in compare({**now, **history.asked}, now)
        ]
        source = Path(self.rules.space.source)
        try:
            if source.is_file():
                now, asked = load_space(str(source)).as_dict(), self.rules.space.as_dict()
                found += [f"{source}: {change}" for change in compare(asked, now)]
        except (TuneMnistError, OSError) as error:
            found.append(f"{source} can no longer be used: {error}")
        return found


def compare(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every entry that differs between two nested mappings."""
    found = []
    for key in sorted(then.keys() | now.keys(), key=str):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += compare(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {str(old)[:100]}, is now {str(new)[:100]}")
    return found


def versions() -> dict[str, str]:
    """Return the versions that results depend on; `code` is a digest of this package's source."""
    return {
        "tune_mnist": tune_mnist.__version__,
        "code": _code_digest(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def machine() -> dict[str, Any]:
    return {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()}


def _code_digest() -> str:
    root = Path(tune_mnist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
