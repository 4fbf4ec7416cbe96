"""Every adapter beside its installed peer: ``python -m contrastive_kernels.compat check``.

One module per library holds its cases: what is called of the adapter and of the peer alike. The tests run the same.
"""
