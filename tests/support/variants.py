"""The losses in every path through their code: what the tests of all losses are parametrised over.

`CASES` and `FAMILY` of testing.py have every loss in its main forms. `VARIANTS` adds forms that differ in
an option, in the number of views or in the inputs. Losses that need other shapes have their grid here.
"""

from __future__ import annotations

from dataclasses import replace

import torch

import python_ref
from tests.support.testing import (
    AS_THEY_ARE,
    BAND,
    CASES,
    FAMILY,
    GRID,
    HALF,
    Case,
    two,
)


def partial_labels(n: int, classes: int | None = None) -> torch.Tensor:
    """Return labels of classes of about four, a class of one, and about a quarter of the samples without label."""
    labels = torch.randint(max(n // 4, 1) if classes is None else classes, (n,))
    labels[torch.rand(n) < 0.25] = -1
    labels[n // 2] = 10**12
    return labels


class PartialLabels(Case):
    """A case of labelled features in which some samples have no label."""

    def features(self, shape, dtype=torch.float64, device="cpu"):
        features = super().features(shape, dtype, device)
        if "label_embeddings" in features:
            labels = torch.randint(len(features["label_embeddings"]), (shape[0],))
            labels[torch.rand(shape[0]) < 0.25] = -1
        else:
            labels = partial_labels(shape[0])
        if "contrast_labels" in features:
            features["contrast_labels"] = partial_labels(shape[1]).to(device)
        return {**features, "labels": labels.to(device)}


class Correlated(Case):
    """A case of two correlated views whose columns differ in size and have a mean."""

    def features(self, shape, dtype=torch.float64, device="cpu"):
        size = self.shapes(*shape)["z0"]
        first = torch.randn(size, dtype=torch.float64) * torch.linspace(0.5, 1.5, size[-1], dtype=torch.float64) + 0.3
        second = first + 0.5 * torch.randn(size, dtype=torch.float64)
        return {name: x.to(dtype).to(device) for name, x in (("z0", first), ("z1", second))}

    def __call__(self, module, features, **options):
        """The reference has one method."""
        if module is python_ref and "method" in self.options:
            fixed = {k: v for k, v in self.options.items() if k != "method"}
            return Case(self.loss, self.shapes, fixed)(module, features, **options)
        return super().__call__(module, features, **options)


def mises_fisher(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """Return the decoupled loss's weights of positives as the paper has them, for sigma = 0.5."""
    return 2 - z0.shape[0] * ((z0 * z1).sum(1) / 0.5).softmax(0)


def sup_con(count: int, **options) -> Case:
    """Return a case of `count` views, of one view without its own dimension for 0."""

    def shapes(n, m, d):
        return {"features": (n, count, d) if count else (n, d), "labels": (n,)}

    return PartialLabels("sup_con_loss", shapes, options)


def sup_con_rows(**options) -> Case:
    """Return a case of one view against other rows."""

    def shapes(n, m, d):
        return {"features": (n, d), "labels": (n,), "contrast_features": (m, d), "contrast_labels": (m,)}

    return PartialLabels("sup_con_loss", shapes, options)


def label_pull(form: str) -> Case:
    def shapes(n, m, d):
        return {"z": (n, d), "labels": (n,), "label_embeddings": (m, d)}

    without = ("temperature", "logit_scale") if form == "pull" else ()
    return PartialLabels("label_pull_loss", shapes, {"form": form}, without=without)


def two_views(loss: str, **options) -> Case:
    return Case(f"{loss}_loss", two("z0", "z1"), options)


def false_negative(views: int, **options) -> Case:
    def shapes(n, m, d):
        return {"z0": (n, d), "z1": (n, d)} if views == 2 else {"z0": (n, views, d)}

    return Case("false_negative_loss", shapes, options, unit=True)


def easy_negative(shared: bool = False, **options) -> Case:
    def shapes(n, m, d):
        return {"query": (n, d), "positive_key": (n, d), **({"negative_keys": (m, d)} if shared else {})}

    return Case("easy_negative_loss", shapes, options, unit=True)


def quick_thoughts(**options) -> Case:
    return Case("quick_thoughts_loss", two("first", "second"), options)


def triplet(unit=False, **options) -> Case:
    return Case("triplet_margin_loss", two("anchor", "positive"), options, unit=unit)


def correlated(loss: str, positions: int = 1, **options) -> Case:
    def shapes(n, m, d):
        size = (n, d) if positions == 1 else (n, positions, d)
        return {"z0": size, "z1": size}

    return Correlated(f"{loss}_loss", shapes, options)


MEANINGS = ("out", "in", "pairwise")
# Own views or classes as positives, all rows against each other or view 1 against all.
SUP_CON = {
    **{f"sup_con-{meaning}-partial": sup_con(2, positives=meaning) for meaning in MEANINGS},
    **{f"sup_con-{meaning}-one_view": sup_con(0, positives=meaning) for meaning in MEANINGS},
    **{f"sup_con-{meaning}-ignore": sup_con(3, positives=meaning, same_label="ignore") for meaning in MEANINGS},
    **{f"sup_con-{meaning}-first": sup_con(3, positives=meaning, contrast_mode="one") for meaning in MEANINGS},
    "sup_con-out-negative-first": sup_con(3, same_label="negative", contrast_mode="one"),
    "sup_con-sum-partial": sup_con(2, positives="sum"),
}
SUP_CON_ROWS = {f"sup_con-{meaning}-rows": sup_con_rows(positives=meaning) for meaning in ("out", "pairwise")}
NEGATIVES = {
    "debiased-floor": two_views("debiased", tau_plus=0.6, temperature=0.5),
    "debiased-polarized": two_views("debiased", polarization=BAND),
    "hard_negative-floor": two_views("hard_negative", tau_plus=0.6, beta=0.5),
    "hard_negative-detached": two_views("hard_negative", detach_weights=True, beta=2.5),
    "hard_negative-biased": two_views("hard_negative", tau_plus=0.0),
    "hard_negative-easy": two_views("hard_negative", estimator="easy"),
    "hard_negative-polarized": two_views("hard_negative", polarization=BAND),
}
DECOUPLED = {
    "decoupled": FAMILY["decoupled"],
    "decoupled-weighted": two_views("decoupled", positive_weight=mises_fisher),
}
SELECTED = {
    "nnclr-both": Case(
        "nnclr_loss",
        lambda n, m, d: {"z": (n, 2, d), "predictions": (n, 2, d), "support": (m, d)},
        detached=("z", "support"),
        unit=True,
    ),
    "false_negative-both_rules": false_negative(2, threshold=0.2, top_k=3),
    "false_negative-threshold": false_negative(2, threshold=0.2, top_k=None),
    "false_negative-top_k": false_negative(2, threshold=None, top_k=5, factor=1.0),
    "false_negative-views": false_negative(3, threshold=0.1, top_k=4),
    "false_negative-attract-both_rules": false_negative(2, mode="attract", threshold=0.2, top_k=3),
    "false_negative-attract-threshold": false_negative(2, mode="attract", threshold=0.2, top_k=None),
    "false_negative-attract-top_k": false_negative(2, mode="attract", threshold=None, top_k=1),
    "false_negative-attract-views": false_negative(3, mode="attract", threshold=0.1, top_k=4, factor=1.0),
    "easy_negative-few": easy_negative(k=5),
    "easy_negative-one": easy_negative(k=1),
    "easy_negative-below": easy_negative(select="below", threshold=-0.1),
    "easy_negative-shared": easy_negative(shared=True, k=20),
}
MOMENTS = {
    # a mean or sum is one weighted sweep, the losses of all rows are another
    "spectral_contrastive-correlated": correlated("spectral_contrastive", reduction="mean"),
    "spectral_contrastive-gram": correlated("spectral_contrastive", method="gram", reduction="none"),
    "spectral_contrastive-tile": correlated("spectral_contrastive", method="tile", reduction="none"),
    "spectral_contrastive-all_pairs": correlated(
        "spectral_contrastive", include_diagonal=True, mu=3.0, reduction="mean"
    ),
    "spectral_contrastive-unit": correlated("spectral_contrastive", normalize=True, reduction="sum"),
    "barlow_twins-correlated": correlated("barlow_twins"),
    "barlow_twins-unbiased": correlated("barlow_twins", std="unbiased", lambd=0.1),
    "barlow_twins-std_eps": correlated("barlow_twins", std="unbiased", std_eps=1e-3),
    "barlow_twins-unit": correlated("barlow_twins", normalize=True),
    "vicreg-correlated": correlated("vicreg"),
    "vicreg-weights": correlated("vicreg", sim_weight=2.0, var_weight=3.0, cov_weight=5.0, eps=0.1),
    "vicreg-positions": correlated("vicreg", positions=2),
    "vicreg-unit": correlated("vicreg", normalize=True),
}
VARIANTS = {
    **SUP_CON,
    **SUP_CON_ROWS,
    "label_pull-partial": label_pull("pull"),
    "label_pull-softmax-partial": label_pull("softmax"),
    **NEGATIVES,
    **DECOUPLED,
    "quick_thoughts-raw": quick_thoughts(),
    "quick_thoughts-3": quick_thoughts(context_size=3),
    "quick_thoughts-exclude": quick_thoughts(diagonal="exclude"),
    "quick_thoughts-polarized": quick_thoughts(polarization=BAND),
    "quick_thoughts-normalized": quick_thoughts(normalize=True, polarization=BAND, context_size=2),
    **SELECTED,
    "siglip-mild": replace(FAMILY["siglip"], options={"logit_scale": 10.0, "logit_bias": -3.0}),
    "triplet_margin-euclidean-normalized": triplet(metric="euclidean"),
    "triplet_margin-hardest-normalized": triplet(unit=True, mining="hardest"),
    "triplet_margin-hardest-euclidean-normalized": triplet(unit=True, mining="hardest", metric="euclidean"),
    "uniformity-unit": Case("uniformity_loss", lambda n, m, d: {"z": (n, d)}, {"normalize": True}),
    "t_simclr-unit": two_views("t_simclr", normalize=True, temperature=0.1, df=1.0),
    **MOMENTS,
}

# The main forms, and all forms.
ALL = {**CASES, **FAMILY}
EVERY = {**ALL, **VARIANTS}


# The fewest rows and columns where they are not one.
LEAST = {
    "uniformity_loss": (2, 1),
    "t_simclr_loss": (2, 1),
    "quick_thoughts_loss": (2, 1),
    # on a line all similarities are 1 and -1: ties, which rounding decides
    "arcl_loss": (1, 2),
    "moco_arcl_loss": (1, 2),
}

# (N, M, D) and what it is for; one dtype for all, the other dtypes for one.
LABEL_SHAPES = {
    (1, 1, 1): "one of everything",
    (2, 63, 24): "at most one class of two",
    (63, 65, 100): "no multiple of any tile",
    (129, 2, 200): "more than one tile of every backend; D above 128",
}
SELECTION_SHAPES = {
    (1, 1, 1): "one of everything: no negative in the batch",
    (2, 63, 24): "fewer candidates in the batch than are selected",
    (65, 129, 24): "one more than a tile",
    (129, 33, 100): "more rows than columns, D no multiple of 8",
}
MOMENT_SHAPES = {
    (33, 33, 100): "N x N, no multiple of 8",
    (24, 24, 24): "as many rows as columns: N x N",
    (129, 129, 24): "D x D",
    (520, 520, 3): "many rows, few columns",
}


def grid(shapes, *others) -> list:
    """Return all shapes in float32, and `others` in the other dtypes too."""
    return [
        *((shape, torch.float32) for shape in shapes),
        *((shape, dtype) for shape in others for dtype in (torch.float16, torch.bfloat16, torch.float64)),
    ]


LABEL_GRID = [*grid(LABEL_SHAPES, (63, 65, 100)), ((1, 1, 1), torch.float64)]
SELECTION_GRID = grid(SELECTION_SHAPES, (65, 129, 24))
MOMENT_GRID = grid(MOMENT_SHAPES, (33, 33, 100), (129, 129, 24))
GRIDS = {
    "sup_con_loss": LABEL_GRID,
    "label_pull_loss": LABEL_GRID,
    "nnclr_loss": SELECTION_GRID,
    "false_negative_loss": SELECTION_GRID,
    "easy_negative_loss": SELECTION_GRID,
    # two rows have a test of their own
    "spectral_contrastive_loss": MOMENT_GRID,
    "barlow_twins_loss": MOMENT_GRID,
    "vicreg_loss": MOMENT_GRID,
}


def grid_of(case: Case) -> list:
    """Return the shapes and dtypes on which a case is compared with the reference."""
    rows, columns = LEAST.get(case.loss, (1, 1))
    points = [((max(n, rows), m, max(d, columns)), dtype) for (n, m, d), dtype in GRIDS.get(case.loss, GRID)]
    return list(dict.fromkeys(points))


SELECTING = ("nnclr_loss", "false_negative_loss", "easy_negative_loss")


def rows_as_they_are(case: Case, dtype: torch.dtype) -> dict:
    """Return the option that keeps unit rows where another rounding would change which pairs are selected."""
    return AS_THEY_ARE if case.unit and (dtype in HALF or case.loss in SELECTING) else {}
