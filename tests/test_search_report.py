from drivers import Searches

pytest_plugins = ["ray_fixtures"]


def test_a_search_draws_its_report_at_its_end(searches: Searches) -> None:
    driver = searches.start("drawn", "--trials", 3, "--report")
    assert driver.wait() == 0, driver.output
    page = searches.folder("drawn") / "report.html"
    assert driver.output.endswith(f"report: {page}\n")
    assert ", finished; " in page.read_text()


def test_a_report_that_cannot_be_drawn_fails_no_search(searches: Searches) -> None:
    driver = searches.start("spoilt", "--trials", 3, "--report", "--max-concurrent", 1)
    page = searches.folder("spoilt") / "report.html"
    driver.wait_until(lambda: (searches.folder("spoilt") / "events.jsonl").exists())
    page.mkdir()
    assert driver.wait() == 0, driver.output
    assert "warning: the report could not be drawn (IsADirectoryError" in driver.output
    assert "Traceback" not in driver.output
