import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock
from optuna.samplers import RandomSampler
from PIL import Image
from support.browser import visit
from support.recorded import RecordedSearch
from support.reported import EVIL, all_failed, empty, rich, write_search

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.model_file import pack_model
from tune_mnist.mnist.net import Net
from tune_mnist.reporting.page import report_path, write_report
from tune_mnist.runs.space import available_spaces, load_space
from tune_mnist.runs.view import RunView


def _page(*searches: RecordedSearch, **options: object) -> str:
    runs = [RunView.read(search.folder.path) for search in searches]
    path = searches[0].folder.path / "report.html"
    write_report(runs, path, pictures=False, **options)  # type: ignore[arg-type]
    return path.read_text()


def _said(page: str) -> str:
    """Return a page's text, without its scripts and styles."""
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", page)


def _add_model(search: RecordedSearch) -> None:
    import io

    import torch

    weights = io.BytesIO()
    torch.save(Net().state_dict(), weights)
    content = pack_model(TrainConfig(), weights.getvalue(), trial=3, epoch=9)
    search.folder.best_model.write_bytes(content)


def test_a_browser_draws_every_chart_of_runs_of_every_kind_and_has_no_complaint(
    tmp_path: Path,
) -> None:
    full = rich(tmp_path, "rich <b>& famous")
    _add_model(full)
    others = [
        empty(tmp_path, "empty"),
        all_failed(tmp_path),
        rich(tmp_path, EVIL.replace("/", ""), trials=6, end=""),
    ]
    page = _page(full, *others)
    charts = page.count('class="chart"')
    assert charts >= 20
    found = visit(full.folder.path / "report.html")
    assert found.console == []
    assert found.dom.count('class="main-svg"') >= charts
    assert len(re.findall('class="chart [^"]*js-plotly-plot', found.dom)) == charts
    assert "WebGL is not supported" not in _said(found.dom)
    title = re.findall(r"<title>(.*?)</title>", found.dom)[0]
    assert title.startswith("rich &lt;b&gt;")


def test_a_page_carries_all_it_needs_and_nothing_that_a_run_says_is_taken_for_html(
    tmp_path: Path,
) -> None:
    search = rich(tmp_path, "x" + EVIL.replace("/", ""))
    page = _page(search)
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?(?:http|//)", page) == []
    assert "<img src=x" not in page
    assert page.count("<script") == len(re.findall("<script nonce=", page))
    assert "default-src 'none'" in page
    assert len(page) < 6e6


def test_the_verdict_comes_first_and_the_command_and_versions_last(tmp_path: Path) -> None:
    said = _said(_page(rich(tmp_path)))
    order = [
        *("Best of 24 trials", "The best configurations", "Learning curves", "Progress"),
        *("Where the budget went", "Hyperparameters", "What mattered", "What the best model"),
        *("python -m tune_mnist.search --space default --trials 20 --epochs 9", "ray: 2.60.0"),
    ]
    places = [said.index(words) for words in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: empty(path, "empty"), "No trial was started."),
        (all_failed, "None of 3 trials finished an epoch to be judged by."),
        (lambda path: rich(path, end="SIGINT"), "interrupted, and can be gone on with"),
        (lambda path: rich(path, end=""), "killed, and can be gone on with"),
    ],
)
def test_a_search_of_any_kind_has_a_report(tmp_path: Path, make: object, words: str) -> None:
    assert callable(make)
    assert words in _said(_page(make(tmp_path)))


@pytest.mark.parametrize("name", available_spaces())
def test_a_search_of_each_space_that_comes_along_has_a_report(tmp_path: Path, name: str) -> None:
    # The baseline need not lie in the space: some search weight decay, which it lacks, by ratios.
    space, draw = load_space(name), optuna.create_study(sampler=RandomSampler(seed=0))
    search = empty(tmp_path, "run")
    search.trial([0.98], state="complete")
    for _ in range(3):
        config: dict[str, Any] = space.config(space.sample(draw.ask())).as_dict()
        search.trial([0.98, 0.99], state="complete", **config)
    write_search(search, space=space.as_dict())
    assert "parallel coordinates" in _page(search)


def test_a_search_at_work_is_reported_as_such(tmp_path: Path) -> None:
    search = rich(tmp_path, end="")
    with FileLock(search.folder.path / ".lock"):
        assert "still running as this was written" in _said(_page(search))


def test_without_a_model_or_mnist_it_says_so(tmp_path: Path) -> None:
    search = rich(tmp_path)
    assert "best.pt does not exist" in _said(_page(search))
    search.folder.best_model.write_bytes(b"no model")
    assert "holds no model of this net" in _said(_page(search))
    assert "test images are not in" in _said(_page(search, data_dir=tmp_path))


def test_runs_that_asked_different_questions_are_called_so(tmp_path: Path) -> None:
    one, two = rich(tmp_path, "one"), rich(tmp_path, "two")
    assert "The same metric, epochs a trial and training images" in _said(_page(one, two))
    write_search(two, images=6000)
    assert "Not the same question: the runs differ in images" in _said(_page(one, two))


def test_the_pictures_are_drawn_beside_the_page(tmp_path: Path) -> None:
    runs = [RunView.read(rich(tmp_path, name).folder.path) for name in ("one", "two $x$")]
    assert report_path(runs) == tmp_path / "report-one-two $x$.html"
    written = [
        *write_report(runs[:1], tmp_path / "a.html"),
        *write_report(runs, tmp_path / "b.html"),
    ]
    pictures = [path for path in written if path.suffix == ".png"]
    assert [path.name for path in pictures] == [
        *("a-progress.png", "a-curves.png", "b-progress.png"),
    ]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (1200, 690)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


def test_the_command_writes_a_report_and_refuses_what_is_no_run(tmp_path: Path) -> None:
    search = empty(tmp_path, "run")
    command = [sys.executable, "-m", "tune_mnist.report", "--no-pictures"]
    path = search.folder.path
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{path / 'report.html'}\n"), done.stderr
    done = subprocess.run(
        [*command, tmp_path / "rum"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "does not exist (did you mean 'run'?)" in done.stderr
