"""The compiled arithmetic of a CPU."""
