"""What `python -m tune_mnist.bench` measures, one part a file; nothing of the product needs it."""
