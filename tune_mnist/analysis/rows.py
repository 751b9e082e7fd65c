"""One epoch of one trial: its columns, and the line of `epochs.csv` that holds it."""

import math

INTEGERS = ("trial", "epoch", "test_correct", "diverged_step")
METRICS = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "test_correct",
    "seconds",
    "evaluation_seconds",
    "diverged_step",
)
COLUMNS = ("trial", *METRICS, "elapsed")

Row = dict[str, float | int | None]


def format_row(row: Row) -> str:
    """Return an epoch as a line of CSV: floats in full, what was not measured left empty."""
    return ",".join(_cell(column, row[column]) for column in COLUMNS)


def _cell(column: str, value: float | int | None) -> str:
    if value is None or math.isnan(value):
        return ""
    # Plain numbers' own way to be written: NumPy's have another.
    return int.__repr__(int(value)) if column in INTEGERS else float.__repr__(float(value))


def parse_row(line: str) -> Row:
    """Read a line that `format_row` wrote."""
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(COLUMNS)} cells were expected, but got {len(cells)}")
    row: Row = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        if column in INTEGERS:
            row[column] = int(cell) if cell else None
        else:
            row[column] = float(cell) if cell else math.nan
    return row


def check_header(line: str) -> None:
    """Refuse the first line of a file with other columns than these."""
    if tuple(line.strip().split(",")) != COLUMNS:
        raise ValueError(
            f"the columns {','.join(COLUMNS)} were expected; another version of tune_mnist may "
            "have written others"
        )
