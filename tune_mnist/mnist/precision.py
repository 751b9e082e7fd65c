"""How precisely a GPU computes the training steps.

float32 is the default: only its losses can be compared with a CPU's, step by step. Evaluation is
always in float32, and so are weights, their updates and batch norm's statistics.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from tune_mnist.errors import ConfigError

Precision = Literal["float32", "tf32", "bf16"]


def check_precision(precision: Precision, device: str) -> None:
    """Raise ConfigError unless the device computes as precisely as asked, and no more so."""
    if precision != "float32" and device == "cpu":
        raise ConfigError(f"--precision {precision} is for GPUs: a CPU computes in float32")


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Have CUDA compute float32 convolutions and products as they are, or rounded to TF32."""
    import torch

    cudnn: Any = torch.backends.cudnn  # whose `conv` its type lacks
    settings = (cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:  # torch's own default is TF32 for convolutions
        setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def forward_in(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Return the context in which a forward pass computes in bfloat16 where that is asked for."""
    if precision != "bf16":
        return nullcontext()
    import torch

    # A captured graph must round the weights anew at each replay: none are kept rounded.
    return torch.autocast(device, dtype=torch.bfloat16, cache_enabled=False)
