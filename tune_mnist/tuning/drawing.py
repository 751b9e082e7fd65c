"""The report at the end of a search or a confirmation."""

from pathlib import Path

from tune_mnist.analysis.wording import short_path
from tune_mnist.cli import tell


def draw_report(path: Path, data_dir: Path | None) -> None:
    """Draw a run's report; a search that went well does not fail for a picture of it."""
    try:
        # Imported here, where they are needed: the charts' libraries take a second.
        from tune_mnist.analysis.report import report_path, write_report
        from tune_mnist.analysis.runs import RunView

        run = RunView.read(path)
        written = write_report([run], report_path([run]), data_dir=data_dir)
        tell(f"report: {short_path(written[0])}")
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        tell(
            f"warning: the report could not be drawn ({what}); nothing else is missing, and "
            f"python -m tune_mnist.report {path} tries again"
        )
