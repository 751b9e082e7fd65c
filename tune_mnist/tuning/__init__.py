"""The search: Ray and Optuna around the workload."""
