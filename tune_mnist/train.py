"""Train one configuration of the net, without a search.

    python -m tune_mnist.train                                  the reference baseline
    python -m tune_mnist.train --set lr=0.05 --epochs 5         another rate, a quarter as long
    python -m tune_mnist.train --config mine.yaml --save model.pt
    python -m tune_mnist.train --run results/mine --trial 12    a trial of a search, on all images

All 60,000 training images are trained on, and the test set is measured after every epoch.
"""

import sys
import time
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from tqdm import tqdm  # type: ignore[import-untyped]

from tune_mnist.cli import (
    AT_LEAST_0,
    AT_LEAST_1,
    Interrupted,
    Limit,
    Options,
    OutputPath,
    UserPath,
    run,
    tell,
)
from tune_mnist.errors import ConfigError, TuneMnistError
from tune_mnist.mnist.config import (
    CONFIG_FIELDS,
    Precision,
    TrainConfig,
    check_precision,
    override,
    read_config,
)
from tune_mnist.runs.files import write_output
from tune_mnist.runs.folder import RunFolder
from tune_mnist.runs.history import History
from tune_mnist.runs.view import read_search
from tune_mnist.supervise import stops

# torch takes more than a second to import. Functions that need it import it themselves, so that
# --help and a misspelt option are answered at once.
if TYPE_CHECKING:
    from torch import Tensor

    from tune_mnist.mnist.metrics import EpochMetrics
    from tune_mnist.mnist.training import EpochResult

DEFAULT_EPOCHS = 20
DRAW_EVERY = 0.1  # seconds between two drawings of the bar

_MOST_THREADS = Limit.at_most(1024)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Options):
    """Train one configuration of the net and test it after every epoch.

    Without options this is the reference baseline: SGD at a constant rate, 20 epochs on all
    60,000 training images. MNIST is fetched when it is missing.
    """

    config: UserPath | None = None
    """YAML file of hyperparameters, one `name: value` a line; the others keep their defaults."""

    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", negative="", show_default=False)
    ] = ()
    """One hyperparameter as NAME=VALUE, over the file's; may be given several times."""

    run: UserPath | None = None
    """Folder of a search, one of whose trials is trained again; needs --trial."""

    trial: Annotated[int | None, AT_LEAST_0] = None
    """Number of that trial, as in the run's best.csv."""

    epochs: Annotated[int | None, AT_LEAST_1] = None
    """Passes over the training images; schedules stretch over all of them. 20, or the run's."""

    images: Annotated[int | None, AT_LEAST_1] = None
    """Train on only so many images, all digits in proportion, for a quick look."""

    seed: Annotated[int, AT_LEAST_0] = 0
    """Fixes initial weights, order, distortions and dropout."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto is a GPU where there is one."""

    precision: Precision = "float32"
    """What a GPU computes training steps in; tf32 and bf16 are less precise. Evaluation is always
    in float32."""

    threads: Annotated[int | None, AT_LEAST_1, _MOST_THREADS] = None
    """CPU threads to compute with; all cores unless given."""

    save: OutputPath | None = None
    """Keep the weights in this file, written anew after every epoch."""

    data_dir: UserPath | None = None
    """Folder of MNIST, `DIR/MNIST/raw`; one in your cache folder unless given."""


def train_by(settings: TrainSettings) -> None:
    """Train as the settings say and print each epoch."""
    config, epochs = chosen(settings)
    if settings.save is not None:
        check_writable(settings.save)

    import torch

    from tune_mnist.mnist.data import load_mnist, split
    from tune_mnist.mnist.net import layer_table
    from tune_mnist.mnist.training import train

    device = chosen_device(settings.device)
    check_precision(settings.precision, device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    data = split(load_mnist(settings.data_dir), holdout=False, images=settings.images)

    tell(layer_table())
    tell(describe(config))
    bar = StepBar(-(-len(data.train_labels) // config.batch_size))
    done: list[EpochMetrics] = []
    try:
        # Within compiled code a Ctrl-C was once seen to have no effect, for an unknown reason. One
        # that is recorded, and looked for between steps, cannot be lost.
        with stops.acting(lambda _: None):

            def on_step(step: int, loss: "Tensor") -> None:
                bar.step(step, loss)
                if stops.first is not None:
                    raise KeyboardInterrupt

            results = train(
                config,
                data,
                epochs=epochs,
                seed=settings.seed,
                device=device,
                precision=settings.precision,
                on_step=on_step,
            )
            for epoch in range(1, epochs + 1):
                tell(f"Epoch : {epoch}")
                with bar:
                    result = next(results)
                check_converging(result.metrics, config)
                done.append(result.metrics)
                tell(test_line(result.metrics, images=len(data.test_labels)))
                if settings.save is not None:
                    save(settings.save, config, settings, epochs, result)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted in epoch {epoch}. {summary(done)}") from None
    tell(summary(done))


def chosen(settings: TrainSettings) -> tuple[TrainConfig, int]:
    """Return what to train, the file's, a trial's or the baseline under --set, and how long."""
    config, epochs = TrainConfig(), settings.epochs or DEFAULT_EPOCHS
    if settings.run is not None or settings.trial is not None:
        config, epochs = of_trial(settings)
    elif settings.config is not None:
        config = read_config(settings.config)
    try:
        return override(config, settings.overrides), epochs
    except ConfigError as error:
        raise ConfigError(f"--set: {error}") from error


def of_trial(settings: TrainSettings) -> tuple[TrainConfig, int]:
    """Return the configuration of the trial that --run and --trial name, and its epochs."""
    if settings.run is None or settings.trial is None or settings.config is not None:
        raise ConfigError("--run and --trial go together, and without --config")
    folder = RunFolder.open(settings.run)
    trials = History.load(folder).trials
    if settings.trial not in trials:
        raise ConfigError(
            f"--trial: the {len(trials)} trials of {settings.run} are numbered from 0, "
            f"but got {settings.trial}"
        )
    epochs = settings.epochs or read_search(folder).asked.epochs
    return trials[settings.trial].config, epochs


def chosen_device(device: str) -> str:
    """Return "cpu" or "cuda", or raise ConfigError for "cuda" without a GPU torch can use."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU it can use here; try --device cpu")
    return device


class _Bar(tqdm):  # type: ignore[misc]
    def __del__(self) -> None:
        """Do not close: StepBar does, and Ctrl-C may have kept this one from being finished."""


class StepBar:
    """The progress of an epoch: a live bar on a terminal, elsewhere one line when it has ended."""

    def __init__(self, steps: int) -> None:
        self.steps, self.is_live = steps, sys.stdout.isatty()

    def __enter__(self) -> None:
        self.drawn = time.perf_counter()
        # With a size: a container's terminal may report 0 x 0, where tqdm draws nothing.
        live = {"file": sys.stdout, "ncols": get_terminal_size().columns, "nrows": 2}
        line = {"file": StringIO(), "ncols": 100, "ascii": True}
        self.bar = _Bar(total=self.steps, **(live if self.is_live else line))

    def step(self, number: int, loss: "Tensor") -> None:
        self.bar.n = number
        now = time.perf_counter()
        last = number == self.steps
        # Looking at the loss waits for a GPU: only as often as an eye can follow.
        if last or now - self.drawn >= DRAW_EVERY:
            self.drawn = now
            if self.is_live:
                self.bar.ncols = get_terminal_size().columns
            self.bar.set_description(f"Loss={loss.item():.4f} batch_id={number - 1}")
        if last:
            self._finish()  # now, and not after the evaluation, which is no step of the epoch

    def _finish(self) -> None:
        if not self.is_live and self.bar.desc:
            tell(str(self.bar))
        self.bar.close()

    def __exit__(self, *exception: object) -> None:
        if self.bar.n < self.steps:  # diverged or interrupted
            self._finish()


def describe(config: TrainConfig) -> str:
    """Return one line on how a configuration differs from the baseline."""
    changed = [
        f" {name}={value}"
        for name, value in config.as_dict().items()
        if value != CONFIG_FIELDS[name].default
    ]
    return f"Configuration: baseline{' with' if changed else ''}{''.join(changed)}"


def check_converging(result: "EpochMetrics", config: TrainConfig) -> None:
    if result.diverged_step is not None:
        raise TuneMnistError(
            f"training diverged in epoch {result.epoch} at step {result.diverged_step}: "
            f"the loss is no longer finite; a lower lr may help (it is {config.lr:g})"
        )


def test_line(result: "EpochMetrics", images: int) -> str:
    return (
        f"Test set: Average loss: {result.test_loss:.4f}, "
        f"Accuracy: {result.test_correct}/{images} ({result.test_accuracy:.2%})"
    )


def summary(done: "list[EpochMetrics]") -> str:
    if not done:
        return "No epoch was finished."
    best = max(done, key=lambda result: result.test_accuracy)
    return (
        f"Last test accuracy: {done[-1].test_accuracy:.2%}, after epoch {done[-1].epoch}. "
        f"Best: {best.test_accuracy:.2%}, after epoch {best.epoch}, an epoch picked on the test "
        "set itself."
    )


def check_writable(path: Path) -> None:
    """Raise ConfigError unless a file can be written there; leaves nothing behind."""
    if path.is_dir():
        raise ConfigError(f"--save {path}: is a folder; name a file in it")
    try:
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"--save {path}: cannot be written: {error.strerror}") from error


def save(
    path: Path, config: TrainConfig, settings: TrainSettings, epochs: int, result: "EpochResult"
) -> None:
    """Write the weights and where they come from, or raise TuneMnistError and leave the old file.

    `torch.load(path, weights_only=True)` reads it.
    """
    from tune_mnist.mnist.checkpoint import pack_model

    content = pack_model(
        config,
        result.weights,
        seed=settings.seed,
        images=settings.images,  # None: all 60,000
        epochs=epochs,
        epoch=result.metrics.epoch,  # finished; fewer than `epochs` if training was broken off
        test_accuracy=result.metrics.test_accuracy,
        test_loss=result.metrics.test_loss,
    )
    try:
        write_output(path, content)
    except OSError as error:
        raise TuneMnistError(f"--save {path}: cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    run("train", TrainSettings, train_by)
