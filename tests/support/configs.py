"""A configuration for tests that train."""

from tune_mnist.mnist.config import TrainConfig

EVERYTHING = TrainConfig(
    lr=0.03,
    nesterov=True,
    weight_decay=1e-3,
    batch_size=8,
    schedule="onecycle",
    dropout=0.2,
    label_smoothing=0.1,
    rotation=10,
    shift=0.1,
    scale=0.1,
    elastic=0.04,
    ema_decay=0.9,
)
