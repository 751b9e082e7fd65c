"""Turn a person's picture of a digit into an image as MNIST has them.

MNIST's digits were scaled to fit a box of 20 by 20 pixels, grey where an edge falls between two,
and put into 28 by 28 with their centre of mass in the middle: light ink on black.
"""

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from tune_mnist.errors import ConfigError

Floats = npt.NDArray[np.float64]

SIDE, BOX = 28, 20  # px: an image, and the digit in it
_MIDDLE = 14.0  # px, counted from 0: where the centres of mass of MNIST's own digits are
_LARGEST = 800  # px: beyond that a side is scaled down first
_LEAST_CONTRAST = 20.0  # grey levels of 255 by which ink must differ from its background
_NOISE = 4.0  # standard deviations of the background: less is not ink
_SPECK = 0.1  # of the largest stroke's ink: less is no part of the digit
_STROKE = BOX / 10  # px: a thinner line fades away when it is scaled down


def read_digit(path: Path) -> npt.NDArray[np.uint8]:
    """Return the digit of an image file, uint8 [28, 28], as MNIST would have it.

    The image may have any size, be dark on light or light on dark, in colour, transparent, or in
    uneven light; it must hold one digit, upright. Raise ConfigError if no digit can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft("L", (_LARGEST, _LARGEST))  # JPEG: do not unpack what is thrown away
                grey = _grey(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} is no image that can be read") from error
    except Image.DecompressionBombWarning as error:
        raise ConfigError(f"{path} has too many pixels: scale it down first") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, SyntaxError, EOFError) as error:  # Pillow's words for damaged files
        raise ConfigError(f"{path} is damaged ({error})") from error
    ink = _ink(grey)
    if ink is None:
        raise ConfigError(f"{path}: nothing in it can be told from its background")
    return centred(_boxed(_digit(ink)))


def centred(box: Floats) -> npt.NDArray[np.uint8]:
    """Centre a digit, [at most 28, at most 28] in [0, 1], by its centre of mass."""
    height, width = box.shape
    middle = ndimage.center_of_mass(box)
    top = int(np.clip(round(_MIDDLE - middle[0]), 0, SIDE - height))
    left = int(np.clip(round(_MIDDLE - middle[1]), 0, SIDE - width))
    whole = np.zeros((SIDE, SIDE), dtype=np.uint8)
    whole[top : top + height, left : left + width] = np.rint(255 * box)
    return whole


def _grey(image: Image.Image) -> Floats:
    """Return an image as grey levels from 0 to 255, on a background against its ink."""
    image = image.convert("RGBA")
    image.thumbnail((_LARGEST, _LARGEST))
    colours = np.asarray(image, dtype=np.float64)
    grey = colours[..., :3] @ np.array([0.299, 0.587, 0.114])  # as bright as an eye sees it
    alpha = colours[..., 3] / 255
    if alpha.sum() > 0:
        # Whatever is transparent is black or white to the file, and neither to the eye.
        behind = 255.0 if np.average(grey, weights=alpha) < 128 else 0.0
        grey = alpha * grey + (1 - alpha) * behind
    return np.asarray(grey, dtype=np.float64)


def _ink(grey: Floats) -> Floats | None:
    """Return how much ink each pixel holds, from 0 to 1; None where none does."""
    if min(grey.shape) < 3:
        return None
    background, noise = _background(grey)
    darker = background - grey
    # Ink is darker or lighter than the background: the one that more of the picture is.
    beyond = max(_LEAST_CONTRAST, _NOISE * noise)
    dark, light = (np.where(sign * darker > beyond, sign * darker, 0).sum() for sign in (1, -1))
    ink = darker if dark >= light else -darker
    top = np.percentile(ink[ink > beyond], 90) if (ink > beyond).any() else 0.0
    if top < _LEAST_CONTRAST:
        return None
    least = min(max(0.15 * top, _NOISE * noise), 0.5 * top)
    return np.where(ink < least, 0.0, np.minimum(ink / top, 1.0))


def _background(grey: Floats) -> tuple[Floats, float]:
    """Fit a plane, as a lamp from one side makes it, to the rim; with the noise around it."""
    height, width = grey.shape
    rim = np.ones(grey.shape, dtype=bool)
    edge = max(1, min(height, width) // 20)
    rim[edge:-edge, edge:-edge] = False
    rows, columns = np.indices(grey.shape, dtype=np.float64)
    terms = np.stack([np.ones_like(grey), rows / height, columns / width], axis=-1)
    used = rim
    for _ in range(3):  # ink that reaches the rim is no background
        plane, *_ = np.linalg.lstsq(terms[used], grey[used], rcond=None)
        difference = grey - terms @ plane
        noise = 1.4826 * float(np.median(np.abs(difference[used])))
        kept = rim & (np.abs(difference) <= max(3 * noise, _LEAST_CONTRAST))
        if kept.sum() < rim.sum() / 3:  # no plane fits: one level must do
            return np.full_like(grey, np.median(grey[rim])), 0.0
        used = kept
    return np.asarray(terms @ plane), noise


def _digit(ink: Floats) -> Floats:
    """Return the part of the picture that holds the digit, without specks and dark corners."""
    parts, count = ndimage.label(ink > 0.3, structure=np.ones((3, 3)))
    if count == 0:
        return ink
    amounts = ndimage.sum_labels(ink, parts, np.arange(1, count + 1))
    rim = {*parts[0], *parts[-1], *parts[:, 0], *parts[:, -1]}
    candidates = [i for i in range(1, count + 1) if i not in rim]
    # What touches the rim is a frame or a shadow, if something else is there.
    if not candidates or max(amounts[i - 1] for i in candidates) < 0.2 * max(amounts):
        candidates = list(range(1, count + 1))
    largest = max(amounts[i - 1] for i in candidates)
    chosen = [i for i in candidates if amounts[i - 1] >= _SPECK * largest]
    near = ndimage.binary_dilation(np.isin(parts, chosen), iterations=2)  # with their soft edges
    ink = np.where(near, ink, 0)
    (held,) = ndimage.find_objects((ink != 0).astype(int))
    return np.asarray(ink[held])


def _boxed(ink: Floats) -> Floats:
    """Scale a digit so that its longer side fills the box."""
    scale = BOX / max(ink.shape)
    stroke = 2 * float(ndimage.distance_transform_edt(np.pad(ink > 0.5, 1)).max())
    missing = round(_STROKE / scale - stroke)
    if missing > 0:
        ink = ndimage.grey_dilation(np.pad(ink, missing // 2 + 1), size=(missing + 1, missing + 1))
        scale = BOX / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    picture = Image.fromarray(np.rint(255 * ink).astype(np.uint8))
    way = Image.Resampling.BICUBIC if max(ink.shape) < BOX else Image.Resampling.BOX
    box = np.asarray(picture.resize((width, height), way), np.float64)
    return np.asarray(np.clip(box / max(box.max(), 1.0), 0, 1))
