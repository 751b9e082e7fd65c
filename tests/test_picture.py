from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tune_mnist.errors import ConfigError
from tune_mnist.mnist.data import Mnist
from tune_mnist.mnist.picture import read_digit

Uint8s = npt.NDArray[np.uint8]
DIGITS = 60


def dark_on_light(digit: Uint8s) -> Image.Image:
    return Image.fromarray(255 - digit).resize((420, 420), Image.Resampling.BICUBIC)


def off_centre(digit: Uint8s) -> Image.Image:
    whole = Image.new("L", (500, 300), 240)
    grey = 240 - (digit * 0.8).astype(np.uint8)
    whole.paste(Image.fromarray(grey).resize((150, 150)), (330, 20))
    return whole


def transparent(digit: Uint8s, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGBA", (28, 28), (*colour, 0))
    image.putalpha(Image.fromarray(digit))
    return image.resize((200, 200))


def coloured(digit: Uint8s) -> Image.Image:
    mask = Image.fromarray(digit).resize((180, 180), Image.Resampling.BICUBIC)
    ink, paper = (Image.new("RGB", mask.size, each) for each in ("crimson", "lemonchiffon"))
    return Image.composite(ink, paper, mask)


def photographed(digit: Uint8s) -> Image.Image:
    """Grainy paper lit from one side, with a speck and a dark edge of the table."""
    draw = np.random.RandomState(int(digit.sum()) % 1000)
    light = np.linspace(120, 230, 320)[None, :] * np.linspace(1, 0.85, 320)[:, None]
    mask = np.asarray(Image.fromarray(digit).resize((200, 200), Image.Resampling.BICUBIC)) / 255
    ink = np.zeros((320, 320))
    ink[50:250, 70:270] = mask
    grey = light * (1 - 0.7 * ink) + draw.normal(0, 4, ink.shape)
    grey[290:294, 20:24] = 40
    grey[:, :8] = 30
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))


RENDERINGS: dict[str, Callable[[Uint8s], Image.Image]] = {
    "plain": Image.fromarray,
    "dark on light": dark_on_light,
    "off centre": off_centre,
    "transparent, dark": partial(transparent, colour=(20, 30, 90)),
    "transparent, light": partial(transparent, colour=(255, 250, 220)),
    "coloured": coloured,
    "photographed": photographed,
}


@pytest.mark.parametrize("rendering", RENDERINGS)
def test_a_picture_becomes_the_digit_that_it_was_made_of(
    rendering: str, mnist: Mnist, tmp_path: Path
) -> None:
    path = tmp_path / "digit.png"
    likeness = []
    for digit in mnist.test_images[:DIGITS]:
        RENDERINGS[rendering](digit).save(path)
        found = read_digit(path).astype(float)
        likeness.append(np.corrcoef(found.ravel(), digit.astype(float).ravel())[0, 1])
    assert np.median(likeness) > 0.93
    assert np.mean(np.array(likeness) > 0.7) >= 0.9  # a pixel off lowers it a lot


def test_a_thin_pen_is_not_lost(tmp_path: Path) -> None:
    page = np.full((600, 600), 255, dtype=np.uint8)
    page[100:500, 300:302] = 0  # a 1, two pixels wide
    path = tmp_path / "one.png"
    Image.fromarray(page).save(path)
    found = read_digit(path)
    assert found.max() == 255
    assert (found > 128).any(axis=1).sum() >= 18
    assert 1 <= (found > 128).any(axis=0).sum() <= 4


def save_half(path: Path) -> None:
    Image.effect_noise((50, 50), 99).save(path)
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, r"cannot be read \(No such file or directory\)"),
        (lambda path: path.write_bytes(b"GIF89a but no"), "digit.png"),
        (save_half, "digit.png"),
        (lambda path: path.write_text("no image"), "is no image that can be read"),
        (lambda path: path.mkdir(), r"cannot be read \(Is a directory\)"),
        (lambda path: Image.new("L", (50, 50), 200).save(path), "nothing in it can be told"),
        (lambda path: Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path), "nothing in it"),
        (lambda path: Image.new("L", (1, 1), 200).save(path), "nothing in it can be told"),
    ],
)
def test_what_is_no_picture_of_a_digit_is_refused_in_one_line(
    make: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    make(tmp_path / "digit.png")
    with pytest.raises(ConfigError, match=rf"^.*{words}.*\Z"):
        read_digit(tmp_path / "digit.png")
