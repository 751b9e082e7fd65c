"""Read digits from image files with the best model of a search.

python -m tune_mnist.predict results/default seven.png photo.jpg
"""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from tune_mnist.cli import UserPath, run, tell
from tune_mnist.errors import ConfigError

SURE = 0.9  # below that, the second guess is printed as well


@dataclass(frozen=True)
class PredictSettings:
    """Read the digit in each image file, and print how sure the model is.

    An image may have any size, be dark on light or light on dark, in colour or transparent; it
    must hold one digit, upright.
    """

    run: Annotated[UserPath | None, Parameter(show_default=False)] = None
    """Folder of a search, whose best model is used; or the file of a model."""

    images: Annotated[tuple[UserPath, ...], Parameter(negative="", show_default=False)] = ()
    """Image files, each with one digit."""

    _: KW_ONLY

    show: bool = False
    """Also draw what the model sees, 28 by 28, in characters."""


def predict(settings: PredictSettings) -> None:
    """Read the digits; an image that cannot be read raises ConfigError after the others."""
    if settings.run is None or not settings.images:
        raise ConfigError("name a run's folder and one or more image files")

    # torch takes more than a second to import: not for --help.
    import numpy as np
    import torch

    import tune_mnist
    from tune_mnist.mnist.images import normalised, scaled
    from tune_mnist.mnist.picture import read_digit

    net = tune_mnist.load(settings.run)
    errors = []
    for path in settings.images:
        try:
            digit = read_digit(path)
        except ConfigError as error:
            errors.append(str(error))
            continue
        with torch.inference_mode():
            chances = net(normalised(scaled(torch.from_numpy(digit[np.newaxis])))).exp()[0]
        first, second = chances.argsort(descending=True)[:2].tolist()
        said = f"{path}: {first} ({chances[first]:.1%})"
        if chances[first] < SURE:
            said += f", or else {second} ({chances[second]:.1%})"
        tell(said)
        if settings.show:
            tell("\n".join("".join(" .:oO@"[pixel // 43] * 2 for pixel in row) for row in digit))
    if errors:
        raise ConfigError("; ".join(errors))


if __name__ == "__main__":
    run("predict", PredictSettings, predict)
