"""What moves the weights: the optimizer, the learning rate of every step, the running average."""

from copy import deepcopy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tune_mnist.mnist.config import TrainConfig
from tune_mnist.mnist.net import Net

Floats = npt.NDArray[np.floating]

# Smith & Topin, arXiv 1708.07120, with the factors of torch.optim.lr_scheduler.OneCycleLR.
ONECYCLE_START = 1 / 25
ONECYCLE_END = 1 / 25 / 1e4


def build_optimizer(net: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer; `fused` does all 36 tensors in one call."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            net.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    return torch.optim.AdamW(
        net.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


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


class Average:
    """The exponential moving average of a net's weights and batch-norm statistics.

    torch's AveragedModel takes ten times as long (0.26 ms on one core).
    """

    def __init__(self, net: Net, decay: float) -> None:
        self.net = deepcopy(net).requires_grad_(False)
        self.decay = decay
        self.steps = 0  # counted here and not on the device, which nobody then waits for
        # The values share the nets' memory: both nets are only ever changed in place.
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._averages, self._weights = [list(side) for side in zip(*floats, strict=True)]
        self._average_counts, self._counts = [list(side) for side in zip(*counts, strict=True)]

    def update(self) -> None:
        """Take the net's present weights into the average."""
        decay = averaging_decay(self.decay, np.array(self.steps))
        torch._foreach_lerp_(self._averages, self._weights, float(1 - decay))
        torch._foreach_copy_(self._average_counts, self._counts)  # batch norm's batches seen
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average and its age."""
        return {"net": self.net.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state_dict`."""
        self.net.load_state_dict(state["net"])
        self.steps = state["steps"]
