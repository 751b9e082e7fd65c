from pathlib import Path

import pandas as pd
import pytest
from support.drivers import Searches
from support.reported import rich

from tune_mnist.runs.folder import RunFolder
from tune_mnist.tuning.launch import draw_report

pytest_plugins = ["support.ray_fixtures"]


def test_a_search_confirms_its_winners_in_half_of_its_time_and_draws_its_report(
    searches: Searches,
) -> None:
    driver = searches.start(
        "ended", *("--trials", 4, "--epochs", 3, "--time-budget", "5m", "--confirm", "--report")
    )
    assert driver.wait() == 0, driver.output
    folder = RunFolder.open(searches.folder("ended"))
    assert folder.read_search()["asked"]["time_budget"] == 300
    assert "for at most 2 min 30 s" in " ".join(driver.output.split())
    table = pd.read_csv(folder.path / "confirmed.csv")
    assert list(table["n"]) == [5] * 4
    assert list(table["images"]) == [1000] * 4
    assert "Over 5 fresh seeds on 1,000 training images" in " ".join(driver.output.split())
    page = folder.path / "report.html"
    assert driver.output.endswith(f"report: {page}\n")
    assert ", finished; " in page.read_text()
    assert "Over 5 fresh seeds on 1,000 training images" in page.read_text()
    again = searches.resume("ended")
    assert again.wait() == 0, again.output
    said = " ".join(again.output.split())
    assert "all 4 trials are finished" in said
    assert "Over 5 fresh seeds on 1,000 training images" in said


def test_a_report_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = rich(tmp_path).folder.path
    (folder / "report.html").mkdir()
    draw_report(folder, None)
    said = capsys.readouterr().out
    assert said.startswith("warning: the report could not be drawn (IsADirectoryError")
    assert said.count("\n") == 1
