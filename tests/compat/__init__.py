"""The adapters of contrastive_kernels.compat."""
