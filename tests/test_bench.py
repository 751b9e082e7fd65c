"""The benchmarks' own arithmetic and output; never a speed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tune_mnist.benchmarks import pack as pack_module
from tune_mnist.benchmarks import peer_training
from tune_mnist.benchmarks import peers as peers_module
from tune_mnist.benchmarks import turnaround as turnaround_module
from tune_mnist.benchmarks.busy import busy_shares, busy_shares_of_run
from tune_mnist.benchmarks.gpu import GpuSettings, gpu, keys_of
from tune_mnist.benchmarks.gpu import measure as measure_gpu
from tune_mnist.benchmarks.measurements import Measurements, quartiles
from tune_mnist.benchmarks.pack import PackSettings, best_way, cuda_mps, pack
from tune_mnist.benchmarks.peer_task import Task, note_epoch, read_progress, write_chosen
from tune_mnist.benchmarks.peer_training import build_optimizer, build_schedule
from tune_mnist.benchmarks.peers import Outcome, PeersSettings, peers
from tune_mnist.benchmarks.sources import Note, Trivial, Watched, read_notes, turnarounds
from tune_mnist.benchmarks.step import StepSettings, step
from tune_mnist.benchmarks.turnaround import TurnaroundSettings, turnaround
from tune_mnist.benchmarks.watched_search import Observation, watch_search
from tune_mnist.errors import ConfigError, TuneMnistError
from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.data import Mnist, default_data_dir, split
from tune_mnist.mnist.net import Net
from tune_mnist.mnist.optim import learning_rates
from tune_mnist.runs.history import Assignment
from tune_mnist.tuning.packing import Packing, Probe
from tune_mnist.tuning.resources import Node, TrialResources


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    line = capsys.readouterr().out.splitlines()[-1]
    found: dict[str, Any] = json.loads(line)
    return found


def note(process: int, trial: int, epoch: int, began: float, ended: float, **more: float) -> Note:
    training = more.get("training", ended - began)
    return Note(process, trial, epoch, began, ended, training, 700.0, 500.0)


def two_workers() -> list[list[Note]]:
    return [
        [note(1, 0, 1, 0.0, 10.0), note(1, 0, 2, 10.1, 20.0), note(1, 2, 1, 20.2, 30.0)],
        [note(2, 1, 1, 0.0, 10.0, training=8.0), note(2, 3, 1, 10.3, 20.0)],
    ]


def test_numbers_are_shown_as_medians_with_quartiles_and_n(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    taken = Measurements("part")
    taken.add("one", "step_ms", 3.0, 1.0)
    taken.add("one", "step_ms", 2.0)
    assert taken.median("one", "step_ms") == 2.0
    assert math.isnan(taken.median("two", "step_ms"))
    assert taken.table().splitlines()[1].split() == ["one", "step_ms", "2", "1.5", "2.5", "3"]
    taken.finish({"a": 1.23456, "b": math.nan, "c": {"d": 2.0}}, tmp_path / "part.csv")
    found = last_line(capsys)
    assert (found["part"], found["a"], found["b"], found["c"]) == ("part", 1.235, None, {"d": 2.0})
    rows = (tmp_path / "part.csv").read_text().splitlines()
    assert rows == [
        "part,subject,quantity,round,value",
        *("part,one,step_ms,0,3", "part,one,step_ms,1,1", "part,one,step_ms,2,2"),
    ]
    assert quartiles([5.0]) == (5.0, 5.0)


def test_numbers_that_cannot_be_kept_are_one_clear_error(tmp_path: Path) -> None:
    taken = Measurements("part")
    taken.add("one", "s", 1.0)
    with pytest.raises(ConfigError, match="--save"):
        taken.finish({}, tmp_path / "nowhere" / "part.csv")


def test_turnarounds_are_between_trials_of_one_worker() -> None:
    assert turnarounds(two_workers()) == pytest.approx([0.2, 0.3])


def test_the_busy_share_is_of_each_slots_own_time() -> None:
    share, steps = busy_shares(two_workers())
    assert share == pytest.approx((10 + 9.9 + 9.8 + 10 + 9.7) / 50)
    assert steps == pytest.approx(share - 2 / 50)


def test_trivial_trials_report_what_real_ones_do_and_go_on_from_a_state(
    small_mnist: Mnist, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    data = split(small_mnist, holdout=True)
    state = None
    for epochs in (2, 4):
        assignment = Assignment(3, TrainConfig(), 0, epochs, "val_accuracy", state)
        reports = list(Watched(Trivial(state_size=10), notes)(assignment, data))
        state = reports[-1].state
        assert [report.metrics.epoch for report in reports] == [epochs - 1, epochs]
    (worker,) = read_notes(notes)
    assert [each.epoch for each in worker] == [1, 2, 3, 4]
    assert all(0 < each.idle <= each.resident + 50 for each in worker)


def test_step_prints_the_ratios_last(capsys: pytest.CaptureFixture[str]) -> None:
    step(StepSettings(quick=True, rounds=2, steps=1))
    found = last_line(capsys)
    assert found["speedup"] == pytest.approx(found["textbook_ms"] / found["ours_ms"], rel=1e-2)
    assert found["over_conv"] == pytest.approx(found["ours_ms"] / found["conv_only_ms"], rel=1e-2)
    assert found["n"] == 2
    assert 0 < found["evaluation_share"] < 1


def test_turnaround_prints_its_keys_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    even = [note(3, 5, epoch, epoch - 1.0, epoch + 0.5) for epoch in range(1, 19)]
    seen = Observation(0.0, 30.0, [*two_workers(), even], [300.0, 320.0])
    monkeypatch.setattr(turnaround_module, "watch_search", lambda *_: seen)
    monkeypatch.setattr(turnaround_module, "time_to_first_step", lambda *_: 7.0)
    turnaround(TurnaroundSettings(quick=True, trials=8))
    found = last_line(capsys)
    assert found["turnaround_s"] == pytest.approx(0.25)
    assert found["first_step_s"] == 7.0
    assert 0.9 < found["steps_share"] < found["busy_share"]
    assert found["ms_per_report"] == pytest.approx(28.5 / 22 * 1e3, rel=1e-3)
    assert found["many_trials_ratio"] == 1.0
    assert found["driver_mb"] == 320.0
    assert found["trial_added_mb"] == 200.0


def test_a_real_search_can_be_watched() -> None:
    seen = watch_search("trivial", ["--space", "sgd", "--trials", "4", "--images", "200"])
    assert {each.trial for each in seen.notes} == {0, 1, 2, 3}
    assert seen.notes[0].ended > seen.began
    assert max(seen.driver_megabytes) > 100


def test_a_search_that_fails_while_it_is_watched_is_one_clear_error() -> None:
    with pytest.raises(TuneMnistError, match="nowhere"):
        watch_search("trivial", ["--space", "nowhere"])


def test_a_runs_busy_share_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(TuneMnistError, match="no run"):
        busy_shares_of_run(tmp_path)


def test_peers_compares_every_system_with_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"ours": 30.0, "ray": 120.0}
    monkeypatch.setattr(
        peers_module, "run", lambda system, task: Outcome(seconds[system], 10, None)
    )
    peers(PeersSettings(systems=("ours", "ray"), rounds=2))
    found = last_line(capsys)
    assert found["epochs_per_hour"] == {"ours": 1200.0, "ray": 300.0}
    assert found["ratio"] == {"ray": 4.0}
    assert found["seconds_to_99"] == {"ours": None, "ray": None}
    assert found["n"] == 2


def test_a_peer_that_fails_is_left_out_and_the_others_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(system: str, task: object) -> Outcome:
        if system == "ray":
            raise TuneMnistError("ray failed with 1: no space left")
        return Outcome(60.0, 10, None)

    monkeypatch.setattr(peers_module, "run", run)
    peers(PeersSettings(systems=("ours", "ray", "optuna_threads"), rounds=2))
    assert last_line(capsys)["ratio"] == {"optuna_threads": 1.0}


def test_peers_refuses_a_space_that_not_all_can_express() -> None:
    with pytest.raises(ConfigError, match="conditions"):
        peers(PeersSettings(space="default"))


def task(folder: Path, images: int = 600, tests: bool = False) -> Task:
    return Task("quick", 2, images, 2, 1, 0, tests, str(default_data_dir()), str(folder))


def test_peers_train_on_the_images_that_ours_does(mnist: Mnist, tmp_path: Path) -> None:
    given = task(tmp_path)
    write_chosen(given)
    ours = split(mnist, holdout=True, images=600)
    for name, images in (("train", ours.train_images), ("val", ours.val_images)):
        chosen = np.load(tmp_path / f"{name}.npy")
        assert np.array_equal(mnist.train_images[chosen], images)
    assert Task.read(given.write()) == given


@pytest.mark.parametrize(("tests", "evaluated"), [(False, [5_000]), (True, [10_000, 5_000])])
def test_peers_evaluate_on_the_test_images_where_asked_to(
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

    monkeypatch.setattr(peer_training, "evaluate_textbook", evaluate)
    given = task(tmp_path, images=150, tests=tests)
    write_chosen(given)
    next(peer_training.train_textbook(given, {}))
    assert sizes == evaluated


def test_epochs_are_noted_in_the_order_of_their_ends(tmp_path: Path) -> None:
    assert read_progress(str(tmp_path)) == []
    note_epoch(str(tmp_path), 1, 0.5)
    note_epoch(str(tmp_path), "two", 0.995)
    progress = read_progress(str(tmp_path))
    assert [each.trial for each in progress] == ["1", "two"]
    outcome = Outcome.of(progress[0].time - 5, progress[0].time + 60, progress)
    assert outcome.epochs == 2
    assert outcome.seconds_to_good == pytest.approx(5, abs=1)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "onecycle"])
def test_peers_schedules_are_ours(schedule: Any) -> None:
    config = TrainConfig(schedule=schedule, lr=0.1, step_every=1)
    optimizer = build_optimizer(Net(), config)
    steps = build_schedule(optimizer, config, epochs=3, steps_per_epoch=7)
    found = []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert found == pytest.approx(learning_rates(config, epochs=3, steps_per_epoch=7).tolist())


def test_gpu_is_skipped_where_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu(GpuSettings(quick=True))
    out = capsys.readouterr().out
    assert "skipped: torch finds no GPU" in out
    found = json.loads(out.splitlines()[-1])
    assert (found["part"], found["n"], found["epoch_s"], found["device"]) == ("gpu", 0, None, None)


def test_gpu_compares_variants_precisions_and_accuracies(small_mnist: Mnist) -> None:
    data = split(small_mnist, holdout=True, images=20)
    few = {name: array[:20] for name, array in vars(data).items() if "train" not in name}
    taken = Measurements("gpu")
    settings = GpuSettings(rounds=1, seeds=1, epochs=1)
    measure_gpu(taken, replace(data, **few), settings, "cpu")
    found = keys_of(taken)
    assert found["n"] == 1
    assert found["speedup"] == pytest.approx(found["eager_epoch_s"] / found["epoch_s"])
    assert found["tf32_accuracy_change"] == 0  # a CPU has none
    missing = {name for name, value in found.items() if value is None or value != value}
    assert missing == {"device"}


def test_pack_names_the_options_to_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Connected:
        def __init__(self, address: str | None) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    def pretend(node: Node, packing: Packing, *_: object) -> Probe:
        return Probe(packing, 100.0 * packing.resources.cpus + 90 * packing.at_once, 800.0)

    monkeypatch.setattr(pack_module, "connected", Connected)
    monkeypatch.setattr(pack_module, "largest_node", lambda: Node("node", 4, 0, 8000.0))
    monkeypatch.setattr(pack_module, "probe_packing", pretend)
    pack(PackSettings(quick=True, save=tmp_path / "pack.csv"))
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert "MPS: skipped, there is no GPU" in out
    assert "--cpus-per-trial 4" in out
    assert (found["at_once"], found["cpus_per_trial"]) == (1, 4.0)
    assert found["epochs_per_hour"] == {"1": 490.0, "2": 380.0, "4": 460.0}
    assert found["mb_per_trial"]["4"] == 800.0
    assert (tmp_path / "pack.csv").read_text().count("\n") == 7


def test_mps_is_advised_only_where_it_is_clearly_better() -> None:
    def probes(*rates: float) -> list[Probe]:
        return [
            Probe(Packing(n, TrialResources(cpus=1, gpus=1 / n)), rate, 500.0)
            for n, rate in enumerate(rates, start=1)
        ]

    assert best_way({"": probes(100, 150)})[1].packing.at_once == 2
    way, best = best_way({"": probes(100, 150), " (MPS)": probes(101, 200)})
    assert (way, best.epochs_per_hour) == (" (MPS)", 200)
    way, best = best_way({"": probes(100, 150), " (MPS)": probes(101, 152)})
    assert (way, best.epochs_per_hour) == ("", 150)


def test_mps_is_skipped_where_it_cannot_be_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "MPS", "no-such-program")
    for is_local in (True, False):
        with cuda_mps(Node("node", 4, 1, 8000.0), is_local=is_local) as environment:
            assert environment is None
    assert capsys.readouterr().out.count("MPS: skipped") == 2


def test_mps_is_ended_after_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mps"
    log = tmp_path / "log"
    program.write_text(f'#!/bin/sh\n[ "$1" = -d ] && echo start >> {log} || cat >> {log}\n')
    program.chmod(0o755)
    monkeypatch.setattr(pack_module, "MPS", str(program))
    with cuda_mps(Node("node", 4, 1, 8000.0), is_local=True) as environment:
        assert environment is not None
        assert Path(environment["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
        assert log.read_text() == "start\n"
    assert log.read_text() == "start\nquit\n"
