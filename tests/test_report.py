import io
import re
from functools import partial
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

from tune_mnist.cli import exit_code
from tune_mnist.errors import RunFolderError
from tune_mnist.mnist.checkpoint import pack_model
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net
from tune_mnist.report import ReportSettings, report
from tune_mnist.reporting.findings import most_at_once
from tune_mnist.reporting.page import repeat_command, report_path, write_report
from tune_mnist.runs.confirmed import Candidate, confirmed_table, write_confirmed
from tune_mnist.runs.space import available_spaces, load_space
from tune_mnist.runs.view import RunView


def _page(*searches: RecordedSearch, **options: Any) -> str:
    runs = [RunView.read(search.folder.path) for search in searches]
    path = searches[0].folder.path / "report.html"
    write_report(runs, path, pictures=False, **options)
    return path.read_text()


def _said(page: str) -> str:
    page = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def _add_model(search: RecordedSearch) -> None:
    weights = io.BytesIO()
    torch.save(Net().state_dict(), weights)
    model = pack_model(TrainConfig(), weights.getvalue(), trial=3, epoch=9)
    search.folder.best_model.write_bytes(model)


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
        "configurations": [{**vars(each), "config": each.config.as_dict()} for each in candidates],
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
    assert "<title>rich &lt;b&gt;" in dom


def test_a_page_carries_all_it_needs_in_order_and_takes_nothing_that_a_run_says_for_html(
    tmp_path: Path,
) -> None:
    search = rich(tmp_path, "x" + EVIL.replace("/", ""))
    _confirm(search)
    page = _page(search)
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
        *("best.pt does not exist", "tune_mnist.search --space default --trials 20 --epochs 9"),
        "ray: 2.60.0",
    ]
    assert re.search(".*".join(map(re.escape, order)), said)
    for words in (
        "Over 1 fresh seed trial 5 reaches a test accuracy of 99.50%",
        "baseline 98.50% 0.71% 2 92.15% to 104.85% 98.50%",
        "trial 5 99.50% - 1 of 2 - +0.50 - 99.50%",
        "1 epoch on all training images, seeds 8, 9. At the last epoch",
        "--top 1 --seeds 2 --epochs 1",
    ):
        assert words in said


def test_searches_of_any_kind_have_a_report(tmp_path: Path) -> None:
    kinds = empty(tmp_path, "empty"), all_failed(tmp_path), rich(tmp_path, end="SIGINT")
    killed, running = (rich(tmp_path, name, end="") for name in ("killed", "running"))
    killed.folder.best_model.write_bytes(b"no model")
    with FileLock(running.folder.path / ".lock"):
        said = _said(_page(*kinds, killed, running))
    for words in (
        *("No trial was started.", "None of 3 trials finished an epoch that counts."),
        *("interrupted, and can be resumed", "killed, and can be resumed"),
        *("still running as this was written", "holds no model of this net"),
    ):
        assert words in said
    assert "test images are not in" in _said(_page(killed, data_dir=tmp_path))


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


def test_the_command_that_repeats_a_search_has_its_flags(tmp_path: Path) -> None:
    search = RunView.read(empty(tmp_path, "run", no_start=True).folder.path).search
    assert repeat_command(search).endswith(" --no-start --seed 0")


def test_a_page_shows_no_secret_of_an_older_run(tmp_path: Path) -> None:
    search = empty(tmp_path, "run")
    with search.folder.search.open("a") as file:
        file.write("storage: s3://b/f?region=x&secret_key=S3kr1t\n")
    page = _page(search)
    assert "region=x" in page
    assert "S3kr1t" not in page


@pytest.mark.parametrize(
    "asked", [{"metric": "loss"}, {"metric": None}, {"epochs": 0}, {"epochs": True}]
)
def test_a_search_yaml_that_does_not_say_what_was_asked_is_refused(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    search = empty(tmp_path, "run", **asked)
    with pytest.raises(RunFolderError, match=r"search\.yaml is damaged \(asked\."):
        RunView.read(search.folder.path)


def test_a_damaged_run_hides_no_other_and_a_damaged_confirmation_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [empty(tmp_path, name).folder for name in ("good", "bad")]
    runs[0].confirmed.write_text("configuration\n")
    runs[1].events.write_text("{}\n")
    settings = ReportSettings(
        (runs[0].path, runs[1].path), pictures=False, data_dir=tmp_path, output=tmp_path / "link"
    )
    (tmp_path / "link").symlink_to("page.html")  # followed, as the user named it
    with pytest.raises(RunFolderError, match=r"bad/events\.jsonl is damaged in line 1"):
        report(settings)
    assert capsys.readouterr().out == f"{tmp_path / 'link'}\n"
    assert "Not shown: " in _said((tmp_path / "page.html").read_text())


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


def test_the_command_writes_a_report_and_refuses_what_is_no_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = empty(tmp_path, "run").folder.path
    run = partial(exit_code, "report", ReportSettings, report)
    assert run(["--no-pictures", str(path)]) == 0
    assert capfd.readouterr() == (f"{path / 'report.html'}\n", "")
    assert run([str(tmp_path / "rum")]) == 2
    assert "does not exist (did you mean 'run'?)" in capfd.readouterr().err
