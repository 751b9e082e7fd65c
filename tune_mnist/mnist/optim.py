"""What every step goes by: its learning rate, and how much of it the average takes in."""

import numpy as np
import numpy.typing as npt

from tune_mnist.mnist.config import TrainConfig

Floats = npt.NDArray[np.floating]

# Smith & Topin, arXiv 1708.07120, with the factors of torch.optim.lr_scheduler.OneCycleLR.
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 25 / 1e4


def learning_rates(config: TrainConfig, *, epochs: int, steps_per_epoch: int) -> Floats:
    """Return the learning rate of every step of the run, [epochs * steps_per_epoch].

    A table instead of torch's schedulers: it has no state to save, and a run that resumes in the
    middle reads on where it stopped. Values equal those schedulers' (StepLR once an epoch,
    CosineAnnealingLR and OneCycleLR once a step); the momentum is left alone.
    """
    total = epochs * steps_per_epoch
    step = np.arange(total)
    match config.schedule:
        case "constant":
            factor: Floats = np.ones(total)
        case "step":
            factor = config.step_factor ** (step // steps_per_epoch // config.step_every)
        case "cosine":
            factor = _cosine(1.0, 0.0, step / total)
        case "onecycle":
            peak = config.peak_position * total - 1
            end = total - 1
            rise = _cosine(ONECYCLE_START, 1.0, step / max(peak, 1e-9))
            fall = _cosine(1.0, ONECYCLE_END, (step - peak) / max(end - peak, 1e-9))
            factor = np.where(step <= peak, rise, fall)
    return config.lr * factor


def _cosine(start: float, end: float, progress: Floats) -> Floats:
    """Go from `start` at progress 0 to `end` at progress 1 along half a cosine."""
    way: Floats = end + (start - end) / 2 * (1 + np.cos(np.pi * progress))
    return way


def averaging_decay(decay: float, steps: npt.NDArray[np.integer]) -> Floats:
    """Return what an average keeps of itself at its next step, after so many.

    The decay grows to its value as (1 + n) / (10 + n), so that the random start is forgotten at
    once (TensorFlow's ExponentialMovingAverage with num_updates).
    """
    return np.minimum(decay, (1 + steps) / (10 + steps))
