"""The loss of a batch, and what the losses of an epoch come to."""

import torch
from torch import Tensor
from torch.nn import functional as F


def smoothed_loss(log_probs: Tensor, labels: Tensor, smoothing: float | Tensor) -> Tensor:
    """Cross-entropy against labels mixed with the uniform distribution (arXiv 1512.00567, 7).

    Args:
        log_probs: float32 [B, 10].
        labels: int64 [B].
        smoothing: the uniform distribution's part; may be a scalar tensor, whose value nobody
            waits for.
    """
    loss = F.nll_loss(log_probs, labels)
    if not isinstance(smoothing, Tensor) and not smoothing:
        return loss
    return (1 - smoothing) * loss - smoothing * log_probs.mean()


def mean_per_image(losses: Tensor, images: int, batch_size: int) -> float:
    """Weigh batch losses by their batches' sizes; the last batch may be a smaller one.

    Args:
        losses: [steps], fewer where the epoch was broken off.
        images: of the whole epoch.
        batch_size: images a batch.
    """
    sizes = torch.full_like(losses, batch_size)
    if len(losses) * batch_size > images:
        sizes[-1] = images % batch_size
    return ((losses * sizes).sum() / sizes.sum()).item()


def first_not_finite(losses: Tensor) -> int | None:
    """Return the 1-based step of the first loss that is NaN or infinite."""
    bad = (~losses.isfinite()).nonzero()
    return int(bad[0].item()) + 1 if len(bad) else None
