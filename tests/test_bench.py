"""The benchmarks' own arithmetic and output; never a speed."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from support.processes import python
from support.recorded import RecordedSearch

from tune_mnist.bench import PARTS
from tune_mnist.benchmarks import (
    cluster,
    gpu,
    pack,
    peers,
    settings,
    step,
    textbook,
    turnaround,
    watched,
)
from tune_mnist.benchmarks.measurements import Measurements
from tune_mnist.benchmarks.peer_systems import Task, read_progress
from tune_mnist.benchmarks.watched import Note, Trivial, Watched
from tune_mnist.cli import tell
from tune_mnist.errors import ConfigError, TuneMnistError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist, default_data_dir, split
from tune_mnist.mnist.net import Net
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.packing import Packing, Probe
from tune_mnist.tuning.resources import Node, TrialResources
from tune_mnist.tuning.settings import SearchSettings


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def note(trial: int, began: float, ended: float, training: float | None = None) -> Note:
    return Note(trial, began, ended, training or ended - began, resident=700.0, idle=500.0)


TWO_WORKERS = [
    [note(0, 0.0, 10.0), note(0, 10.1, 20.0), note(2, 20.2, 30.0)],
    [note(1, 0.0, 10.0, training=8.0), note(3, 10.3, 20.0)],
]


@pytest.mark.parametrize("part", [[], ["cluster"]])
def test_help_waits_for_neither_torch_nor_ray(part: list[str]) -> None:
    done = python("-X", "importtime", "-m", "tune_mnist.bench", *part, "--help", check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tune_mnist.benchmarks.settings" in imported
    assert not imported & {"torch", "ray", "optuna", "pandas"}


def test_each_part_is_a_function_of_its_name_that_takes_its_settings() -> None:
    for part, settings_type in PARTS.items():
        function = getattr(import_module(f"tune_mnist.benchmarks.{part}"), part)
        assert get_type_hints(function) == {"settings": settings_type, "return": type(None)}


def test_numbers_are_shown_as_medians_with_quartiles_and_n(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured = Measurements("part")
    measured.add("one", "step_ms", 3.0, 1.0)
    measured.add("one", "step_ms", 2.0)
    measured.add("two, too", "step_ms", 5.0)
    assert measured.median("one", "step_ms") == 2.0
    assert math.isnan(measured.median("three", "step_ms"))
    one, two = measured.table().splitlines()[1:]
    assert one.split() == ["one", "step_ms", "2", "1.5", "2.5", "3"]
    assert two.split()[-4:] == ["5", "5", "5", "1"]
    measured.finish({"a": 1.23456, "b": math.nan, "c": {"d": 2.0}}, tmp_path / "part.csv")
    found = last_line(capsys)
    assert (found["part"], found["a"], found["b"], found["c"]) == ("part", 1.235, None, {"d": 2.0})
    assert (tmp_path / "part.csv").read_text().splitlines() == [
        "part,subject,quantity,round,value",
        *("part,one,step_ms,0,3", "part,one,step_ms,1,1", "part,one,step_ms,2,2"),
        'part,"two, too",step_ms,0,5',
    ]
    with pytest.raises(ConfigError, match="--save"):
        measured.finish({}, tmp_path / "nowhere" / "part.csv")


def test_turnarounds_and_busy_shares_are_of_each_workers_own_time(tmp_path: Path) -> None:
    assert turnaround.turnarounds(TWO_WORKERS) == pytest.approx([0.2, 0.3])
    share, steps = turnaround.busy_shares(TWO_WORKERS)
    assert share == pytest.approx((10 + 9.9 + 9.8 + 10 + 9.7) / 50)
    assert steps == pytest.approx(share - 2 / 50)
    with pytest.raises(TuneMnistError, match="no run"):
        turnaround.busy_shares_of_run(tmp_path)


def test_trivial_trials_report_what_real_ones_do_and_resume_from_a_state(
    small_mnist: Mnist, tmp_path: Path
) -> None:
    data = split(small_mnist, holdout=True)
    state = None
    for epochs in (2, 4):
        assignment = Assignment(3, TrainConfig(), 0, epochs, "val_accuracy", state)
        reports = list(Watched(Trivial(state_size=10), tmp_path)(assignment, data))
        state = reports[-1].state
        assert [report.metrics.epoch for report in reports] == [epochs - 1, epochs]
    (worker,) = watched.read_notes(tmp_path)
    assert [each.trial for each in worker] == [3, 3, 3, 3]
    assert all(0 < each.idle <= each.resident + 50 for each in worker)


@pytest.mark.slow
def test_step_prints_the_ratios_last(capsys: pytest.CaptureFixture[str]) -> None:
    step.step(settings.StepSettings(quick=True, rounds=2, steps=1))
    found = last_line(capsys)
    assert found["speedup"] == pytest.approx(found["textbook_ms"] / found["ours_ms"], rel=1e-2)
    assert found["over_conv"] == pytest.approx(found["ours_ms"] / found["conv_only_ms"], rel=1e-2)
    assert found["n"] == 2
    assert 0 < found["evaluation_share"] < 1


def test_turnaround_prints_its_keys_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    even = [note(5, epoch - 1.0, epoch + 0.5) for epoch in range(1, 19)]
    seen = [*TWO_WORKERS, even], [300.0, 320.0]
    monkeypatch.setattr(turnaround, "watch_search", lambda *_: seen)
    monkeypatch.setattr(turnaround, "time_to_first_step", lambda *_: 7.0)
    turnaround.turnaround(settings.TurnaroundSettings(quick=True, trials=8))
    found = last_line(capsys)
    assert found["turnaround_s"] == pytest.approx(0.25)
    assert found["first_step_s"] == 7.0
    assert 0.9 < found["steps_share"] < found["busy_share"]
    assert found["ms_per_report"] == pytest.approx(28.5 / 22 * 1e3, rel=1e-3)
    assert found["many_trials_ratio"] == 1.0
    assert found["driver_mb"] == 320.0
    assert found["trial_added_mb"] == 200.0


def test_the_first_step_is_the_first_report_less_what_its_epoch_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def search(_: str, command: list[str], folder: Path) -> nullcontext[None]:
        recorded = RecordedSearch(folder, command[command.index("--run") + 1])
        recorded.folder.write_search({})
        recorded.epoch(recorded.start(), 0.9)  # 2.5 s after its start, which it took
        return nullcontext()

    monkeypatch.setattr(watched, "started", search)
    assert 0 <= watched.time_to_first_step("--trials", "1") < 2.5


@pytest.mark.slow
def test_a_real_search_can_be_watched_and_one_that_fails_is_one_clear_error() -> None:
    workers, megabytes = watched.watch_search("trivial", *turnaround.TRIVIAL, "--trials", "4")
    assert {each.trial for notes in workers for each in notes} == {0, 1, 2, 3}
    assert max(megabytes) > 100
    with pytest.raises(TuneMnistError, match="nowhere"):
        watched.watch_search("trivial", "--space", "nowhere")


def test_peers_compares_others_with_ours_and_leaves_out_one_that_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(system: str, task: Task) -> dict[str, float]:
        if system == "optuna_threads":
            raise TuneMnistError("optuna_threads failed with 1: no space left")
        ended = {"ours": 30.0, "ray": 120.0}[system]
        return peers.outcome(0.0, ended, [(20.0, 0.5)] * 10, task.images)

    monkeypatch.setattr(peers, "run", run)
    peers.peers(settings.PeersSettings(systems=("ours", "optuna_threads", "ray"), rounds=2))
    found = last_line(capsys)
    assert found["epochs_per_hour"] == {"ours": 1200.0, "ray": 300.0}
    assert found["images_per_second"] == {"ours": 2000.0, "ray": 500.0}
    assert found["ratio"] == {"ray": 4.0}
    assert found["seconds_to_99"] == {"ours": None, "ray": None}
    assert found["n"] == 2
    progress = [(10.0, 0.5), (12.0, 0.991), (11.0, 0.995)]
    assert peers.outcome(5.0, 70.0, progress, images=600)["seconds_to_99%"] == 6.0
    with pytest.raises(ConfigError, match="conditions"):
        peers.peers(settings.PeersSettings(space="default"))


@pytest.mark.parametrize(("tests", "evaluated"), [(False, [5_000]), (True, [10_000, 5_000])])
def test_peers_train_on_the_images_that_ours_does_and_record_their_epochs(
    mnist: Mnist,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tests: bool,
    evaluated: list[int],
) -> None:
    sizes = []

    def evaluate(net: Net, loader: Any) -> float:
        sizes.append(len(loader.dataset))
        return 0.5

    monkeypatch.setattr(textbook, "evaluate_textbook", evaluate)
    task = Task("quick", 2, 150, 2, 1, 0, tests, str(default_data_dir()), str(tmp_path))
    task.write()
    given = Task.read(task.file)
    assert given == task
    ours = split(mnist, holdout=True, images=150)
    for name, images in (("train", ours.train_images), ("val", ours.val_images)):
        chosen = np.load(tmp_path / f"{name}.npy")
        assert np.array_equal(mnist.train_images[chosen], images)
    assert read_progress(tmp_path) == []
    next(given.train(TrainConfig()))
    assert sizes == evaluated
    assert [accuracy for _, accuracy in read_progress(tmp_path)] == [0.5]


def test_gpu_is_skipped_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.gpu(settings.GpuSettings(quick=True))
    *told, last = capsys.readouterr().out.splitlines()
    assert "skipped: torch finds no GPU that it can use here" in told
    found = json.loads(last)
    assert (found["part"], found["n"], found["epoch_s"], found["device"]) == ("gpu", 0, None, None)


def test_gpu_compares_variants_precisions_and_accuracies(small_mnist: Mnist) -> None:
    data = split(small_mnist, holdout=True, images=20)
    few = {name: array[:20] for name, array in vars(data).items() if "train" not in name}
    measured = Measurements("gpu")
    asked = settings.GpuSettings(rounds=1, seeds=1, epochs=1)
    gpu.measure(measured, replace(data, **few), asked, device="cpu")
    found = gpu.keys_of(measured)
    assert found["n"] == 1
    assert found["speedup"] == pytest.approx(found["eager_epoch_s"] / found["epoch_s"])
    assert found["tf32_accuracy_change"] == 0  # a CPU has none
    missing = {name for name, value in found.items() if value is None or value != value}
    assert missing == {"device"}


def test_pack_names_the_options_to_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def pretend(node: Node, packing: Packing, *_: object) -> Probe:
        return Probe(packing, 100.0 * packing.resources.cpus + 90 * packing.at_once, 800.0)

    monkeypatch.setattr(pack, "connected", lambda _: nullcontext())
    monkeypatch.setattr(pack, "largest_node", lambda: Node("node", 4, 0, 8000.0))
    monkeypatch.setattr(pack, "probe_packing", pretend)
    pack.pack(settings.PackSettings(quick=True, save=tmp_path / "pack.csv"))
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert "MPS: skipped, there is no GPU" in out
    assert "--cpus-per-trial 4" in out
    assert (found["at_once"], found["cpus_per_trial"]) == (1, 4.0)
    assert found["epochs_per_hour"] == {"1": 490.0, "2": 380.0, "4": 460.0}
    assert found["mb_per_trial"]["4"] == 800.0
    assert (found["mps"], found["epochs_per_hour_mps"]) == (False, None)
    assert (tmp_path / "pack.csv").read_text().count("\n") == 7


def test_mps_is_advised_only_where_it_is_clearly_better() -> None:
    def probes(*rates: float) -> list[Probe]:
        trials = [TrialResources(cpus=1, gpus=1 / n) for n in (1, 2)]
        return [
            Probe(Packing(n, trial), rate, 500.0)
            for n, trial, rate in zip((1, 2), trials, rates, strict=True)
        ]

    assert pack.best_way({"": probes(100, 150)})[1].packing.at_once == 2
    for rate, expected in ((200, (" (MPS)", 200)), (152, ("", 150))):
        way, best = pack.best_way({"": probes(100, 150), " (MPS)": probes(101, rate)})
        assert (way, best.epochs_per_hour) == expected


def test_mps_is_skipped_where_it_cannot_be_started_and_ended_after_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node, program, log = Node("node", 4, 1, 8000.0), tmp_path / "mps", tmp_path / "log"
    monkeypatch.setattr(pack, "MPS", "no-such-program")
    for is_local, reason in ((True, "is not on this machine"), (False, "is not ours to start")):
        with pack.cuda_mps(node, is_local=is_local) as environment:
            assert environment is None
        assert capsys.readouterr().out == f"MPS: skipped, no-such-program {reason}\n"
    program.write_text(f'#!/bin/sh\n[ "$1" = -d ] && echo start >> {log} || cat >> {log}\n')
    program.chmod(0o755)
    monkeypatch.setattr(pack, "MPS", str(program))
    with pack.cuda_mps(node, is_local=True) as environment:
        assert environment is not None
        assert Path(environment["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
        assert log.read_text() == "start\n"
    assert log.read_text() == "start\nquit\n"


def test_reports_count_while_all_trials_are_at_work() -> None:
    epochs = (1, 1, 1, 2, 2, 3, 2, 3, 3)  # of three trials, in the order they were told
    marks = [cluster.Mark(epoch, float(at), at / 2) for at, epoch in enumerate(epochs)]
    assert cluster.steady(marks, at_once=3, epochs=3) == (3.0, 1.5, 3)


@pytest.mark.slow
def test_a_search_on_three_nodes_is_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save = tmp_path / "cluster.csv"
    cluster.cluster(settings.ClusterSettings(at_once=(6,), quick=True, save=save))
    found = last_line(capsys)
    rate, wall = found["reports_per_second"]["6"], found["ms_per_report"]["6"]
    assert rate == pytest.approx(1e3 / wall, rel=1e-2)
    assert found["driver_ms_per_report"]["6"] > 0
    assert found["nodes"] == 3
    assert save.read_text().count("\n") == 4


def test_a_search_that_fails_is_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(settings: SearchSettings) -> int:
        tell("no luck")
        return 1

    monkeypatch.setattr(cluster, "search", fail)
    monkeypatch.setattr(cluster, "three_nodes", lambda _: nullcontext(("nowhere", tmp_path)))
    with pytest.raises(TuneMnistError, match="ended with 1: no luck"):
        cluster.measure(3, 4)
