"""Time and memory of the losses and of other ways to compute them: ``python -m benchmarks --help``."""
