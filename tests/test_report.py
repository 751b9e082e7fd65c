import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from filelock import FileLock
from optuna.samplers import RandomSampler
from PIL import Image
from support.browser import visit
from support.recorded import RecordedSearch
from support.reported import EVIL, all_failed, empty, rich, write_search

from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.checkpoint import pack_model
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net
from tune_mnist.reporting.findings import most_at_once
from tune_mnist.reporting.page import report_path, write_report
from tune_mnist.runs.confirmed import Candidate, confirmed_table, write_confirmed
from tune_mnist.runs.space import available_spaces, load_space
from tune_mnist.runs.view import RunView


def _page(*searches: RecordedSearch, **options: Any) -> str:
    runs = [RunView.read(search.folder.path) for search in searches]
    path = searches[0].folder.path / "report.html"
    write_report(runs, path, pictures=False, **options)
    return path.read_text()


def _said(page: str) -> str:
    """Return a page's text, without its scripts and styles."""
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def _add_model(search: RecordedSearch) -> None:
    weights = io.BytesIO()
    torch.save(Net().state_dict(), weights)
    content = pack_model(TrainConfig(), weights.getvalue(), trial=3, epoch=9)
    search.folder.best_model.write_bytes(content)


def _confirm(search: RecordedSearch) -> None:
    """Confirm the baseline and trial 5, which finishes with one of its two seeds."""
    inner = RecordedSearch(search.folder.path, "confirm")
    finals = {"baseline": (0.99, 0.98), "trial 5": (0.995, None)}
    records = []
    for accuracies in finals.values():
        for seed, final in enumerate(accuracies):
            number = inner.trial([final or 0.5], state="complete" if final else "failed")
            inner.history.trials[number].seed = seed
        records.append(list(inner.history.trials.values())[-2:])
    candidates = [Candidate(name, 0, rank, TrainConfig()) for rank, name in enumerate(finals)]
    table = confirmed_table(candidates, records, epochs=1, images=60_000)
    write_confirmed(search.folder, table)
    asked: dict[str, Any] = {
        "epochs": 1,
        "images": None,
        "seeds": [8, 9],
        "configurations": [{}, {}],
    }
    inner.folder.write_search({"confirmation": asked})


def test_a_browser_draws_every_chart_of_runs_of_every_kind_and_has_no_complaint(
    tmp_path: Path,
) -> None:
    full = rich(tmp_path, "rich <b>& famous")
    _add_model(full)
    _confirm(full)
    evil = rich(tmp_path, EVIL.replace("/", ""), trials=6, end="")
    page = _page(full, empty(tmp_path, "empty"), all_failed(tmp_path), evil)
    charts = page.count('class="chart"')
    assert charts >= 20
    dom, console = visit(full.folder.path / "report.html")
    assert console == []
    assert dom.count('class="main-svg"') >= charts
    assert len(re.findall('class="chart [^"]*js-plotly-plot', dom)) == charts
    assert "WebGL is not supported" not in _said(dom)
    title = re.findall(r"<title>(.*?)</title>", dom)[0]
    assert title.startswith("rich &lt;b&gt;")


def test_a_page_carries_all_it_needs_in_order_and_takes_nothing_that_a_run_says_for_html(
    tmp_path: Path,
) -> None:
    page = _page(rich(tmp_path, "x" + EVIL.replace("/", "")))
    assert re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=.?(?:http|//)", page) == []
    assert "<img src=x" not in page
    scripts = re.findall(r'<script nonce="|<script type="application/json">', page)
    assert page.count("<script") == page.count("</script>") == len(scripts)
    assert "default-src 'none'" in page
    assert len(page) < 6e6
    said = _said(page)
    order = [
        *("Best of 24 trials", "The best configurations", "Learning curves", "Progress"),
        *("Where the budget went", "Hyperparameters", "What mattered", "What the best model"),
        *("python -m tune_mnist.search --space default --trials 20 --epochs 9", "ray: 2.60.0"),
    ]
    assert re.search(".*".join(map(re.escape, order)), said)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: empty(path, "empty"), "No trial was started."),
        (all_failed, "None of 3 trials finished an epoch that counts."),
        (lambda path: rich(path, end="SIGINT"), "interrupted, and can be resumed"),
        (lambda path: rich(path, end=""), "killed, and can be resumed"),
    ],
)
def test_a_search_of_any_kind_has_a_report(
    tmp_path: Path, make: Callable[[Path], RecordedSearch], words: str
) -> None:
    assert words in _said(_page(make(tmp_path)))


@pytest.mark.parametrize("name", available_spaces())
def test_a_search_of_each_of_the_projects_spaces_has_a_report(tmp_path: Path, name: str) -> None:
    # The baseline need not lie in the space: some search weight decay, which it lacks, by ratios.
    space, draw = load_space(name), optuna.create_study(sampler=RandomSampler(seed=0))
    search = empty(tmp_path, "run")
    search.trial([0.98], state="complete")
    for _ in range(3):
        config: dict[str, Any] = space.config(space.sample(draw.ask())).as_dict()
        search.trial([0.98, 0.99], state="complete", **config)
    write_search(search, space=space.as_dict())
    assert "parallel coordinates" in _page(search)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (None, "must be a mapping with the key parameters, but got None"),
        ({"parameters": {"lr": {"low": 1}}}, "needs low and high"),
        ({"parameters": {"warmth": {"low": 0, "high": 1}}}, "unknown hyperparameter"),
    ],
)
def test_a_damaged_space_leaves_out_its_charts_and_says_so(
    tmp_path: Path, space: Any, words: str
) -> None:
    search = rich(tmp_path)
    write_search(search, space=space)
    said = _said(_page(search))
    assert re.search(rf"Hyperparameters Not drawn: .*search\.yaml: .*{words}", said)
    assert "What the best model gets wrong" in said


@pytest.mark.parametrize(
    "asked", [{"metric": "loss"}, {"metric": None}, {"epochs": 0}, {"epochs": True}]
)
def test_a_search_yaml_that_does_not_say_what_was_asked_is_refused(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    search = empty(tmp_path, "run", **asked)
    with pytest.raises(RunFolderError, match=r"search\.yaml is damaged \(asked\.metric is"):
        RunView.read(search.folder.path)


def test_a_search_at_work_is_reported_as_such(tmp_path: Path) -> None:
    search = rich(tmp_path, end="")
    with FileLock(search.folder.path / ".lock"):
        assert "still running as this was written" in _said(_page(search))


def test_what_was_confirmed_is_reported_with_the_command_that_repeats_it(tmp_path: Path) -> None:
    search = rich(tmp_path)
    _confirm(search)
    said = _said(_page(search))
    assert "Over 1 fresh seed trial 5 reaches a test accuracy of 99.50%" in said
    assert re.search(r"baseline 98\.50% 0\.71% 2 92\.15% to 104\.85% 98\.50%", said)
    assert "trial 5 99.50% - 1 of 2 - +0.50 - 99.50%" in said
    assert "1 epoch on all training images, seeds 8, 9. At the last epoch" in said
    assert re.search(r"tune_mnist\.confirm \S+ --top 1 --seeds 2 --epochs 1", said)


def test_without_a_model_or_mnist_the_report_says_so(tmp_path: Path) -> None:
    search = rich(tmp_path)
    assert "best.pt does not exist" in _said(_page(search))
    search.folder.best_model.write_bytes(b"no model")
    assert "holds no model of this net" in _said(_page(search))
    assert "test images are not in" in _said(_page(search, data_dir=tmp_path))


def test_runs_that_were_asked_different_questions_are_called_so(tmp_path: Path) -> None:
    one, two = rich(tmp_path, "one"), rich(tmp_path, "two")
    assert "same metric, epochs per trial and training images" in _said(_page(one, two))
    write_search(two, images=6000)
    assert "Not the same question: the runs differ in images" in _said(_page(one, two))


def test_the_pictures_are_drawn_beside_the_page(tmp_path: Path) -> None:
    runs = [RunView.read(rich(tmp_path, name).folder.path) for name in ("one", "two $x$")]
    assert report_path(runs) == tmp_path / "report-one-two $x$.html"
    one = write_report(runs[:1], tmp_path / "a.html")
    both = write_report(runs, tmp_path / "b.html")
    pictures = [path for path in (*one, *both) if path.suffix == ".png"]
    names = [path.name for path in pictures]
    assert names == ["a-progress.png", "a-curves.png", "b-progress.png"]
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size == (1200, 690)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


@pytest.mark.parametrize(
    ("spans", "most"),
    [([], 0), ([(0, 2), (1, 3), (2, 4)], 2), ([(0, 9), (1, 2), (1, 2)], 3), ([(0, 1), (1, 2)], 1)],
)
def test_spans_that_overlap_are_counted(spans: list[tuple[float, float]], most: int) -> None:
    assert most_at_once(spans) == most


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
