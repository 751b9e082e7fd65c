"""Write a report of a search: one HTML page and its main charts as PNG files.

python -m tune_mnist.report results/default                 writes results/default/report.html
python -m tune_mnist.report results/a results/b             compares them on one page
"""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tune_mnist.cli import OutputPath, UserPath, run, tell
from tune_mnist.errors import ConfigError, RunFolderError, TuneMnistError

if TYPE_CHECKING:
    from tune_mnist.runs.view import RunView


@dataclass(frozen=True)
class ReportSettings:
    """Write a report of a search: one HTML page that needs no network.

    The search may still run, have failed, or have nothing to show yet. The page of several
    searches compares them; one that cannot be read is left out, and the exit code is 2.
    """

    runs: Annotated[tuple[UserPath, ...], Parameter(negative="", show_default=False)] = ()
    """Folders of searches."""

    _: KW_ONLY

    output: OutputPath | None = None
    """The page's file. By default report.html in the run's folder; for several runs, a file
    beside the first, named after all of them."""

    pictures: bool = True
    """Also draw the main charts as PNG files beside the page."""

    data_dir: UserPath | None = None
    """Folder of MNIST, for the digits that the best model gets wrong."""


def report(settings: ReportSettings) -> None:
    """Write the report, or raise TuneMnistError; a run that cannot be read hides no other."""
    if not settings.runs:
        raise ConfigError("name a run's folder, such as results/default")
    # Here and below, because they take a second to import and --help does not need them.
    from tune_mnist.runs.view import RunView

    runs, errors = [], []
    for path in settings.runs:
        try:
            runs.append(RunView.read(path))
        except RunFolderError as error:
            errors.append(error)
    if runs:
        _write(runs, settings)
    if errors:
        # As `cat` does: the others are reported, and the exit code says that one is missing.
        raise RunFolderError("; ".join(map(str, errors)))


def _write(runs: "list[RunView]", settings: ReportSettings) -> None:
    from tune_mnist.reporting.page import write_report

    try:
        written = write_report(
            runs, settings.output, data_dir=settings.data_dir, pictures=settings.pictures
        )
    except OSError as error:
        where = error.filename or settings.output or "the report"
        raise TuneMnistError(
            f"cannot write {where} ({error.strerror}): name another file with --output"
        ) from error
    for each in written:
        tell(str(each))


if __name__ == "__main__":
    run("report", ReportSettings, report)
