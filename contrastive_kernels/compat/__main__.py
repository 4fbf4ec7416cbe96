"""`python -m contrastive_kernels.compat`: the adapters and their peers; `check` compares them."""

import sys

from contrastive_kernels.compat.check.command import main

if __name__ == "__main__":
    sys.exit(main())
