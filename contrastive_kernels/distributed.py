"""Losses over all ranks: ``group=`` of every loss makes the rows of a process group one batch.

Here is what belongs to no single loss.
"""

from contrastive_kernels.primitives.shards import Group, set_shards

__all__ = ["Group", "set_shards"]
