"""The test digits that a run's best model gets wrong."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tune_mnist.mnist.data import read_test_set
from tune_mnist.runs.folder import RunFolder

if TYPE_CHECKING:
    from tune_mnist.mnist.checkpoint import SavedModel

_BATCH = 1000  # images


@dataclass(frozen=True)
class Mistake:
    """A digit that the model read wrongly."""

    index: int  # in the test set
    label: int
    guess: int
    confidence: float  # the probability that the model gave its guess
    image: npt.NDArray[np.uint8]  # [28, 28]

    def png(self) -> str:
        """Return the digit, dark on light, as a data URI."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(255 - self.image).save(buffer, "png", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Mistakes:
    """How a model reads the test set."""

    confusion: npt.NDArray[np.int64]  # [label, guess]: images
    wrong: list[Mistake]  # the most confident first
    facts: dict[str, Any]  # of the model: its trial, its epoch, ...


def find_mistakes(folder: RunFolder, data_dir: Path | None = None) -> Mistakes:
    """Read the test set with a run's best model, or raise TuneMnistError if one is missing."""
    images, labels = read_test_set(data_dir)
    # Here, because torch takes seconds to import and a report can do without.
    from tune_mnist.mnist.checkpoint import load_model

    model = load_model(folder.best_model)
    probabilities = _probabilities(model, images)
    guesses = probabilities.argmax(axis=1)
    confusion = np.zeros((10, 10), dtype=np.int64)
    np.add.at(confusion, (labels, guesses), 1)
    wrong = [
        Mistake(i, int(labels[i]), int(guesses[i]), float(probabilities[i].max()), images[i])
        for i in map(int, np.flatnonzero(guesses != labels))
    ]
    wrong.sort(key=lambda mistake: -mistake.confidence)
    return Mistakes(confusion, wrong, dict(model.facts))


def _probabilities(model: "SavedModel", images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    import torch

    from tune_mnist.mnist.forward import evaluation_forward
    from tune_mnist.mnist.images import normalised, scaled

    batches = torch.split(torch.from_numpy(images.copy()), _BATCH)
    with torch.inference_mode():
        outputs = [evaluation_forward(model.net, normalised(scaled(batch))) for batch in batches]
    return np.asarray(torch.cat(outputs).exp())
