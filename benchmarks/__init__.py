"""Time and memory of the losses and of other ways to compute them: ``python -m benchmarks --help``."""

import os

# A wrong kernel is to be seen, not replaced by PyTorch.
os.environ.setdefault("CONTRASTIVE_KERNELS_FIRST_USE", "0")
