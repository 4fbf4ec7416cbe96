"""Peak memory of forward and backward beyond inputs and gradients, one JSON line a case; a process of its own.

Usage: python tests/memory_probe.py BACKEND [ROWS LOSS ...]
"""

import ctypes
import gc
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import torch
from testing import CASES, FAMILY, Case, two, views

import contrastive_kernels as ck

# MMCL, which keeps N x N matrices, and what only looks at the rows of one sample or label.
WITHOUT_SWEEP = ("mmcl", "alignment", "augmentation_robust", "label_pull")
# Not here: per-anchor negatives (N, M, D), whose own rows are the N x M matrix.
MEASURED = {
    **{name: CASES[name] for name in ("info_nce", "nt_xent", "clip", "moco")},
    "arcl": Case("arcl_loss", views(2)),
    "moco_arcl": CASES["moco_arcl"],
    "nt_xent-polarized": CASES["nt_xent-polarized"],
    "info_nce-smoothed": Case("info_nce_loss", two("query", "positive_key"), {"label_smoothing": 0.1}),
    "info_nce-statistics": Case("info_nce_loss", two("query", "positive_key"), {"return_stats": True}),
    "nt_xent-cutoff": Case("nt_xent_loss", two("z0", "z1"), {"cutoff_margin": 0.0}),
    **{name: case for name, case in FAMILY.items() if name not in WITHOUT_SWEEP},
}
# Losses of two views see two rows a sample.
SELF_SIMILARITY = {
    f"{name}_loss"
    for name in ("nt_xent", "sup_con", "debiased", "hard_negative", "decoupled", "false_negative", "t_simclr")
}
# Rows for a backend. The chunks of the slow one do not grow with N, so that it needs fewer to show a matrix.
ROWS = {"cpp": 16384, "torch": 3072}


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def peak_beyond(function) -> int:
    """Growth of the resident set at its highest while `function` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def measure(case: Case, rows: int, dim: int, backend: str) -> int:
    """Peak bytes beyond inputs and gradients."""
    samples = rows // 2 if case.loss in SELF_SIMILARITY else rows
    features = case.features((samples, rows, dim), torch.float32)
    leaves = {k: v.requires_grad_(v.is_floating_point() and k not in case.detached) for k, v in features.items()}

    def both():
        loss = case(ck, leaves, backend=backend)
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    peak = peak_beyond(both)
    return peak - sum(x.grad.nbytes for x in leaves.values() if x.grad is not None)


if __name__ == "__main__":
    backend = sys.argv[1]
    rows, losses = (int(sys.argv[2]), sys.argv[3:]) if len(sys.argv) > 2 else (None, MEASURED)
    for name in losses:
        size = rows or ROWS[backend]
        measure(MEASURED[name], 512, 64, backend)  # thread pools, workspaces and code
        print(json.dumps({"case": name, "bytes": measure(MEASURED[name], size, 64, backend)}), flush=True)
