"""Time and memory of the losses beside what else computes them: ``python -m benchmarks --help``."""
