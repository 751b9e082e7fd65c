"""The commands that do a search, and its confirmation, again."""

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from tune_mnist.analysis.run import RunFolder
from tune_mnist.analysis.wording import short_path
from tune_mnist.errors import RunFolderError

# The command line's own defaults need not be told.
_DEFAULTS = {"metric": "val_accuracy", "time_budget": None, "images": None}


def repeat_command(search: Mapping[str, Any]) -> str:
    """Return the command whose settings a search.yaml holds.

    A time budget is a matter of the machine: with one, another machine comes further or less far.
    """
    source = PurePath(str(search.get("space_source", "")))
    # One of the project's own spaces goes by its name, wherever the project lay.
    space = source.stem if source.parent.name == "search_spaces" else str(source)
    words = ["python", "-m", "tune_mnist.search", "--space", space]
    for name, value in search["asked"].items():
        if value is not None and _DEFAULTS.get(name, _DEFAULTS) != value:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            words += ["--" + str(name).replace("_", "-"), shown]
    if search.get("confirm"):
        words.append("--confirm")
    return shlex.join(words)


def confirmation_of(folder: RunFolder) -> Mapping[str, Any] | None:
    """Return what was asked of a run's confirmation; None where none can be read."""
    try:
        found = RunFolder(folder.path / "confirm").read_search()["confirmation"]
        known = {"epochs": int, "images": int | None, "seeds": list, "configurations": list}
        is_whole = all(isinstance(found[name], kind) for name, kind in known.items())
    except (RunFolderError, KeyError, TypeError):
        return None
    return found if is_whole else None


def repeat_confirmation(folder: RunFolder, asked: Mapping[str, Any]) -> str:
    """Return the command that confirmed a run's winners."""
    words = ["python", "-m", "tune_mnist.confirm", short_path(folder.path)]
    words += ["--top", f"{len(asked['configurations']) - 1}"]
    words += ["--seeds", f"{len(asked['seeds'])}", "--epochs", f"{asked['epochs']}"]
    if asked["images"] is not None:
        words += ["--images", f"{asked['images']}"]
    return shlex.join(words)
