"""What a search was asked, resolved: the contents of `search.yaml`."""

import hashlib
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args

import tune_mnist
from tune_mnist.errors import RunFolderError, TuneMnistError
from tune_mnist.mnist.config import Precision
from tune_mnist.mnist.metrics import Metric
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.space import SearchSpace, load_space
from tune_mnist.runs.view import refuse_confirmation
from tune_mnist.tuning.experiment import Rules
from tune_mnist.tuning.remote import storage_uri
from tune_mnist.tuning.settings import SearchSettings

DEFAULT_TRIALS = 50
CONFIRMING = 0.5  # of a time budget: what --confirm may have of it
_ASKED: dict[str, tuple[type, ...]] = {
    "metric": (str,),
    "trials": (int,),
    "epochs": (int,),
    "time_budget": (int, float, NoneType),
    "images": (int, NoneType),
    "grace_epochs": (int,),
    "reduction_factor": (int, float),
    "startup_trials": (int,),
    "seed": (int,),
}
_PACKAGES = ("torch", "torchvision", "ray", "optuna", "pandas", "numpy")


@dataclass(frozen=True)
class Plan:
    """The rules of a search and the data it trains on."""

    rules: Rules
    images: int | None  # training images; None: all there are
    storage: str | None = None  # where a copy of the run is kept, a URI
    confirm: bool = False  # whether the winners are confirmed at the end, in the time budget
    precision: Precision = "float32"

    @property
    def search_rules(self) -> Rules:
        """The rules of the search proper, whose time is what is not kept for confirming."""
        part = 1 - CONFIRMING if self.confirm else 1.0
        return replace(self.rules, time_budget=part * self.rules.time_budget)

    @classmethod
    def of(cls, settings: SearchSettings) -> Self:
        """Resolve a new search's settings.

        Raises:
            SearchSpaceError: its space cannot be used.
        """
        return cls._resolve(settings, load_space(settings.space))

    @classmethod
    def _resolve(cls, settings: SearchSettings, space: SearchSpace) -> Self:
        return cls(
            rules=Rules(
                space=space,
                metric=settings.metric,
                trials=settings.trials or DEFAULT_TRIALS,
                epochs=settings.epochs or space.epochs,
                time_budget=settings.time_budget or math.inf,
                grace_epochs=settings.grace_epochs,
                reduction_factor=settings.reduction_factor,
                startup_trials=settings.startup_trials,
                seed=settings.seed,
            ),
            images=settings.images,
            storage=None if settings.storage is None else storage_uri(settings.storage),
            confirm=settings.confirm,
            precision=settings.precision or "float32",
        )

    @classmethod
    def load(cls, folder: RunFolder) -> Self:
        """Read the plan of a run.

        Raises:
            RunFolderError: search.yaml is damaged.
        """
        data = folder.read_search()
        refuse_confirmation(folder, data)
        try:
            space = SearchSpace.from_dict(
                data["space"], str(data["space_name"]), str(data["space_source"])
            )
            # The checks of the command line hold here as well.
            asked = SearchSettings(
                **_typed(data["asked"]),
                storage=_storage(data),
                # Older versions did not note these.
                confirm=bool(data.get("confirm", False)),
                precision=_precision(data),
            )
            return cls._resolve(asked, space)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise RunFolderError(
                f"{folder.search} is damaged ({' '.join(what.split())}): put back a copy"
            ) from error

    def raised(self, settings: SearchSettings) -> Self:
        """Return the plan with what else is asked of it now: trials, time, storage, ..."""
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
        """Write search.yaml.

        Raises:
            OSError: it could not be written.
        """
        rules = self.rules
        folder.write_search(
            {
                "asked": {
                    "metric": rules.metric,
                    "trials": rules.trials,
                    "epochs": rules.epochs,
                    "time_budget": rules.time_budget if math.isfinite(rules.time_budget) else None,
                    "images": self.images,
                    "grace_epochs": rules.grace_epochs,
                    "reduction_factor": rules.reduction_factor,
                    "startup_trials": rules.startup_trials,
                    "seed": rules.seed,
                },
                "storage": self.storage,
                "confirm": self.confirm,
                "precision": self.precision,
                "space_name": rules.space.name,
                # In full: a search may be resumed from another folder.
                "space_source": str(Path(rules.space.source).absolute()),
                "space": rules.space.as_dict(),
                "versions": versions(),
                "machine": machine(),
            }
        )

    def differences(self, folder: RunFolder) -> list[str]:
        """Say what has changed since the run was last worked on: versions, code, space file."""
        then = folder.read_search().get("versions")
        found = compare(then if isinstance(then, Mapping) else {}, versions())
        source = Path(self.rules.space.source)
        if source.is_file():
            try:
                now = load_space(str(source)).as_dict()
                asked = self.rules.space.as_dict()
                found += [f"{source}: {change}" for change in compare(asked, now)]
            except TuneMnistError as error:
                found.append(f"{source} can no longer be used: {error}")
        return found


def _typed(asked: Any) -> dict[str, Any]:
    """Check what search.yaml says was asked: every entry, each of its type.

    Raises:
        KeyError, TypeError: one is missing, or of another type, or unknown.
    """
    if not isinstance(asked, Mapping):
        raise TypeError(f"asked must be a mapping, but got {asked!r}")
    if unknown := asked.keys() - _ASKED.keys():
        raise TypeError(f"asked.{min(unknown, key=str)} is not known to this version")
    for name, types in _ASKED.items():
        # In Python, true and false are whole numbers as well.
        if not isinstance(asked[name], types) or isinstance(asked[name], bool):
            raise TypeError(f"asked.{name} cannot be {asked[name]!r}")
    if asked["metric"] not in get_args(Metric):
        raise TypeError(f"asked.metric cannot be {asked['metric']!r}")
    return dict(asked)


def _storage(data: Mapping[str, Any]) -> str | None:
    storage = data.get("storage")  # older versions knew of none
    if not isinstance(storage, str | None):
        raise TypeError(f"storage cannot be {storage!r}")
    return storage


def _precision(data: Mapping[str, Any]) -> Precision:
    precision: Precision = data.get("precision", "float32")
    if precision not in get_args(Precision):
        raise TypeError(f"precision cannot be {precision!r}")
    return precision


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
    """Describe the driver's machine."""
    return {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()}


def _code_digest() -> str:
    root = Path(tune_mnist.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
