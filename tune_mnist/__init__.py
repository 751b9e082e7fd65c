"""Hyperparameter search for a small MNIST conv net with Ray Tune, Optuna and ASHA."""
