"""What a search was asked, resolved: the contents of `search.yaml`."""

import hashlib
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import tune_mnist
from tune_mnist.errors import RunFolderError, TuneMnistError
from tune_mnist.locations import storage_uri
from tune_mnist.mnist.config import Precision
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.space import SearchSpace, load_space
from tune_mnist.runs.view import refuse_confirmation
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.settings import SearchOptions, SearchSettings

DEFAULT_TRIALS = 50
CONFIRMING = 0.5  # of a time budget: what --confirm may use of it
_OPTIONS = tuple(entry.name for entry in fields(SearchOptions))
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
        data = folder.read_search()
        refuse_confirmation(folder, data)
        try:
            space = SearchSpace.from_dict(
                data["space"], str(data["space_name"]), str(data["space_source"])
            )
            # Older versions did not write all of these.
            others = {name: data[name] for name in _BESIDE_RULES if name in data}
            plan = cls(Rules(space=space, **_asked(data["asked"])), **_checked(others, cls))
            if plan.storage is not None:
                storage_uri(plan.storage)
            return plan
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise RunFolderError(
                f"{folder.search} is damaged ({' '.join(what.split())}): put back a copy"
            ) from error

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
        then = folder.read_search().get("versions")
        found = compare(then if isinstance(then, Mapping) else {}, versions())
        now = self.rules.lasting
        found += [f"{folder.search}: {change}" for change in compare(history.asked or now, now)]
        source = Path(self.rules.space.source)
        if source.is_file():
            try:
                now = load_space(str(source)).as_dict()
                asked = self.rules.space.as_dict()
                found += [f"{source}: {change}" for change in compare(asked, now)]
            except TuneMnistError as error:
                found.append(f"{source} can no longer be used: {error}")
        return found


def _asked(values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"asked must be a mapping, but got {values!r}")
    if unknown := values.keys() - set(_OPTIONS):
        raise TypeError(f"asked.{min(unknown, key=str)} is not known to this version")
    return _checked({name: values[name] for name in _OPTIONS}, Rules, prefix="asked.")


def _checked(values: dict[str, Any], record: type, prefix: str = "") -> dict[str, Any]:
    """Return values read from YAML; TypeError if one does not fit its field in a dataclass."""
    types = get_type_hints(record)
    for name, value in values.items():
        if not _fits(value, types[name]):
            raise TypeError(f"{prefix}{name} cannot be {value!r}")
    return values


def _fits(value: Any, annotation: Any) -> bool:
    """Return True if a value is of a type, which may be a class, a Literal or a union."""
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if isinstance(annotation, UnionType):
        return any(_fits(value, each) for each in get_args(annotation))
    if isinstance(value, bool):  # in Python, a whole number as well
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)


def compare(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name every entry that differs between two nested mappings."""
    found = []
    for key in sorted(then.keys() | now.keys(), key=str):
        old, new = then.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += compare(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is now {new}")
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
