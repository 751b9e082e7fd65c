"""The command that does a search again."""

import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

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
    return shlex.join(words)
