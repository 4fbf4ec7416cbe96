"""What the tests of the diagnostics share: rows, labels and a comparison."""

import torch
import torch.nn.functional as F


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def close(ours, expected, rtol=1e-11, atol=1e-12):
    if not torch.is_tensor(expected):
        expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected.to(ours), rtol=rtol, atol=atol, equal_nan=True)


def labelled(n=61, d=6, classes=4, unlabelled=True):
    """Return features near the centre of their class; the last class is empty, some samples have no label."""
    labels = torch.arange(n) % (classes - 1)
    if unlabelled:
        labels[::7] = -1
    return torch.randn(n, d, dtype=torch.float64) + 2 * torch.eye(d, dtype=torch.float64)[labels], labels
