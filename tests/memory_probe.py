"""Peak memory of forward and backward beyond inputs and gradients, one JSON line a case; a process of its own.

Usage: python tests/memory_probe.py BACKEND [ROWS LOSS ...]
"""

import ctypes
import gc
import inspect
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from testing import CASES, Case, two, views

import contrastive_kernels as ck

# Not here: per-anchor negatives (N, M, D), whose own rows are the N x M matrix.
MEASURED = {
    **{name: CASES[name] for name in ("info_nce", "nt_xent", "clip", "moco")},
    "arcl": Case("arcl_loss", views(2)),
    "moco_arcl": CASES["moco_arcl"],
    "distance_polarization": Case("distance_polarization", lambda n, m, d: {"z": (n, d)}),
    "nt_xent-polarized": CASES["nt_xent-polarized"],
    "info_nce-smoothed": Case("info_nce_loss", two("query", "positive_key"), {"label_smoothing": 0.1}),
    "info_nce-statistics": Case("info_nce_loss", two("query", "positive_key"), {"return_stats": True}),
    "nt_xent-cutoff": Case("nt_xent_loss", two("z0", "z1"), {"cutoff_margin": 0.0}),
    "siglip": Case("siglip_loss", two("image_features", "text_features"), {"logit_scale": 10.0, "logit_bias": -10.0}),
    "sup_con": Case("sup_con_loss", lambda n, m, d: {"features": (n, 2, d)}),
    "debiased": Case("debiased_loss", two("z0", "z1")),
    "hard_negative": Case("hard_negative_loss", two("z0", "z1")),
    "decoupled": Case("decoupled_loss", two("z0", "z1")),
    "quick_thoughts": Case("quick_thoughts_loss", two("first", "second")),
    "false_negative": Case("false_negative_loss", two("z0", "z1")),
    "nnclr": Case("nnclr_loss", lambda n, m, d: {"z": (n, d), "predictions": (n, d), "support": (n, d)}),
    "spectral": Case("spectral_contrastive_loss", two("z0", "z1")),
    "barlow_twins": Case("barlow_twins_loss", two("z0", "z1")),
    "vicreg": Case("vicreg_loss", two("z0", "z1")),
    "uniformity": Case("uniformity_loss", lambda n, m, d: {"z": (n, d)}),
    "t_simclr": Case("t_simclr_loss", two("z0", "z1")),
    "triplet": Case("triplet_margin_loss", two("anchor", "positive")),
    "triplet-hardest": Case("triplet_margin_loss", two("anchor", "positive"), {"mining": "hardest"}),
}
# Losses of two views see two rows a sample.
SELF_SIMILARITY = {
    f"{name}_loss"
    for name in ("nt_xent", "sup_con", "debiased", "hard_negative", "decoupled", "false_negative", "t_simclr")
}
# (rows, losses) of a backend. The chunks of the slow one do not grow with N: fewer rows, the losses that differ.
PLAN = {"cpp": (16384, list(MEASURED)), "torch": (6144, ["nt_xent-polarized", "clip", "arcl"])}


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
    features = {k: v.float() for k, v in case.features((samples, rows, dim)).items()}
    leaves = {k: v.requires_grad_(k not in case.detached) for k, v in features.items()}

    # the losses of moments have no sweep
    backends = {"backend": backend} if "backend" in inspect.signature(getattr(ck, case.loss)).parameters else {}

    def both():
        loss = case(ck, leaves, **backends)
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    peak = peak_beyond(both)
    return peak - sum(x.grad.nbytes for x in leaves.values() if x.grad is not None)


if __name__ == "__main__":
    backend = sys.argv[1]
    rows, losses = (int(sys.argv[2]), sys.argv[3:]) if len(sys.argv) > 2 else PLAN[backend]
    for name in losses:
        measure(MEASURED[name], 512, 64, backend)  # thread pools, workspaces and code
        print(json.dumps({"case": name, "bytes": measure(MEASURED[name], rows, 64, backend)}), flush=True)
