"""`python -m contrastive_kernels check`: every loss on every backend of this machine against float64."""
