"""The options of each part of `bench`, declared where their import costs neither torch nor Ray."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Literal, get_args

from cyclopts import Parameter

from tune_mnist.cli import AT_LEAST_1, Limit, Options, OutputPath, UserPath

_FEW = Limit.at_most(100_000)  # at more, a benchmark would take weeks or a machine's memory
AtLeast1 = Annotated[int, AT_LEAST_1, _FEW]
MaybeAtLeast1 = Annotated[int | None, AT_LEAST_1, _FEW]
AllAtLeast1 = Annotated[tuple[int, ...], AT_LEAST_1, _FEW]
Positive = Annotated[float, Limit("above 0", lambda value: 0 < value < inf), _FEW]
Flag = Annotated[bool, Parameter(negative="")]
Save = Annotated[OutputPath | None, Parameter(help="Write every number to this CSV file.")]
DataDir = Annotated[
    UserPath | None,
    Parameter(help="Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."),
]

System = Literal["ours", "ray", "optuna_threads", "optuna_processes", "syne_tune"]
LineUp = Literal["systems", "stopping", "sampling"]

CURVES = Path("results/bench/curves.csv")  # `bench curves` writes it, `bench replay` reads it


@dataclass(frozen=True, kw_only=True)
class StepSettings(Options):
    """Time the training step on one core, against the textbook recipe and the convolutions."""

    rounds: AtLeast1 = 21
    """Turns of each variant; medians are over these."""
    steps: AtLeast1 = 6
    """Steps in a turn."""
    quick: Flag = False
    """Only the three variants that the ratios need, and fewer turns."""
    save: Save = None
    data_dir: DataDir = None


@dataclass(frozen=True, kw_only=True)
class TurnaroundSettings(Options):
    """Measure what a search costs beside training: between trials, per report, at the start."""

    trials: Annotated[int, Limit.at_least(8), _FEW] = 2000
    """Trivial trials of the long search."""
    minutes: Positive = 3.0
    """Length of the search of full-size epochs."""
    run: UserPath | None = None
    """Take the busy share from this finished run instead of a search of its own."""
    quick: Flag = False
    """Fewer trials, and epochs of 6,000 images instead of full-size ones."""
    save: Save = None
    data_dir: DataDir = None


@dataclass(frozen=True, kw_only=True)
class PeersSettings(Options):
    """Run one search by tune_mnist, Ray's documented recipe, Optuna alone and Syne Tune."""

    space: str = "quick"
    """Search space, one without conditions."""
    trials: AtLeast1 = 8
    """Configurations."""
    images: AtLeast1 = 6000
    """Training images."""
    epochs: AtLeast1 = 4
    """Budget of a trial in epochs; ASHA stops the poor ones from the first on."""
    tests: Flag = False
    """Have the others evaluate on the test images after every epoch, too, as ours always does."""
    at_once: MaybeAtLeast1 = None
    """Trials at once, one core each; one for every core unless given."""
    rounds: AtLeast1 = 2
    """Turns of each system, one after the other."""
    systems: Annotated[tuple[System, ...], Parameter(negative="", show_default=False)] = get_args(
        System
    )
    """Which systems; all unless given. Give several as --systems ours --systems ray."""
    quick: Flag = False
    """One turn, a third of the images."""
    save: Save = None
    data_dir: DataDir = None


@dataclass(frozen=True, kw_only=True)
class PackSettings(Options):
    """Try 1, 2, 4 ... trials at once and say what --cpus-per-trial or --gpus-per-trial to use."""

    seconds: Positive = 30.0
    """How long each packing is tried, in all its turns together."""
    rounds: AtLeast1 = 3
    """Turns of each packing, one after the other."""
    quick: Flag = False
    """One turn of five seconds."""
    address: str | None = None
    """A running Ray cluster, whose largest machine is tried. Without it, this machine."""
    save: Save = None
    data_dir: DataDir = None


@dataclass(frozen=True, kw_only=True)
class ClusterSettings(Options):
    """Measure how reports per second hold up with many trials at once on three nodes."""

    at_once: AllAtLeast1 = (8, 64, 256)
    """Trials at once, one search after another."""
    reports: Annotated[int, Limit.at_least(40), _FEW] = 2000
    """Reports of a search, about."""
    rounds: AtLeast1 = 3
    """Times that each is measured."""
    quick: Flag = False
    """One round of 400 reports."""
    save: Save = None


@dataclass(frozen=True, kw_only=True)
class GpuSettings(Options):
    """Time epochs of 469 steps and 15,000 images' evaluation on a GPU, and compare accuracies."""

    rounds: AtLeast1 = 15
    """Turns of each variant, an epoch each; medians are over these."""
    seeds: AtLeast1 = 5
    """Trainings of each precision, for its test accuracy."""
    epochs: AtLeast1 = 20
    """Length of each of those."""
    quick: Flag = False
    """Fewer turns, and one training of two epochs."""
    save: Save = None
    data_dir: DataDir = None


@dataclass(frozen=True, kw_only=True)
class CurvesSettings(Options):
    """Train random configurations of a space to their end and record every epoch."""

    save: OutputPath = CURVES
    """The CSV file; configurations that it holds are not trained again."""
    space: str = "default"
    """Search space that they are drawn from; its copy beside FILE.csv is FILE.yaml, which a
    recording goes on with."""
    configs: AtLeast1 = 64
    """Configurations in all."""
    epochs: MaybeAtLeast1 = None
    """Epochs of each; the space's own (20) unless given."""
    images: AtLeast1 = 6000
    """Training images."""
    at_once: MaybeAtLeast1 = None
    """Trainings at once, one core each; one for every core unless given."""
    data_dir: DataDir = None


@dataclass(frozen=True, kw_only=True)
class ReplaySettings(Options):
    """Replay searches over recorded curves: the regret of their pick against epochs spent."""

    curves: UserPath = CURVES
    """What `bench curves` has recorded."""
    compare: LineUp = "systems"
    """systems: ours and what others do. stopping, sampling: ours with other settings."""
    repetitions: AtLeast1 = 300
    """Searches of each kind, from different seeds."""
    budgets: AllAtLeast1 = (40, 60, 100, 150)
    """Epochs spent, in all trials together, at which a search is asked for its pick."""
    at_once: AtLeast1 = 4
    """Trials at once."""
    space: str | None = None
    """The space that the curves were drawn from; FILE.yaml beside FILE.csv unless given."""
    save: Save = None

    @property
    def drawn_from(self) -> str:
        return self.space or str(self.curves.with_suffix(".yaml"))
