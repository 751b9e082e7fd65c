"""The workload: MNIST, the net and its training; torch, no Ray."""
