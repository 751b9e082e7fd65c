"""Draw what a search found, as one HTML page and a few pictures.

python -m tune_mnist.report results/default                 writes results/default/report.html
python -m tune_mnist.report results/a results/b             compares them on one page
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tune_mnist.cli import run, tell
from tune_mnist.errors import ConfigError, TuneMnistError


@dataclass(frozen=True)
class ReportSettings:
    """Draw what a search found, as one page that needs no network.

    The search may be at work, have failed, or have nothing to show yet. With several, the page
    compares them.
    """

    runs: Annotated[tuple[Path, ...], Parameter(negative="", show_default=False)] = ()
    """Folders of searches."""

    _: KW_ONLY

    output: Path | None = None
    """The page's file; report.html in the run's folder, and for several runs a file beside the
    first, named after all."""

    pictures: bool = True
    """Also draw the main charts as PNG files beside the page."""

    data_dir: Path | None = None
    """Folder of MNIST, for the digits that the best model gets wrong."""


def report(settings: ReportSettings) -> None:
    """Write the report.

    Raises:
        TuneMnistError: there is no such run, or the report cannot be written.
    """
    if not settings.runs:
        raise ConfigError("name a run's folder, such as results/default")
    # Here and not above: they take a second, and --help can do without.
    from tune_mnist.reporting.page import report_path, write_report
    from tune_mnist.runs.view import RunView

    runs = [RunView.read(path) for path in settings.runs]
    path = settings.output or report_path(runs)
    try:
        written = write_report(runs, path, data_dir=settings.data_dir, pictures=settings.pictures)
    except OSError as error:
        raise TuneMnistError(
            f"cannot write {error.filename or path} ({error.strerror}): name another file with "
            "--output"
        ) from error
    for each in written:
        tell(str(each))


def main() -> None:
    """Run the command."""
    run("report", ReportSettings, report)


if __name__ == "__main__":
    main()
