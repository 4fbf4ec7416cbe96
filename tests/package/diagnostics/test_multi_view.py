"""Classification of several views against its dense definition."""

import pytest
import torch
import torch.nn.functional as F

from contrastive_kernels import diagnostics as dg
from tests.support.diagnostics import close


@pytest.mark.parametrize("combine", ["mean_feature", "mean_score", "max_score", "vote"])
def test_classify_views(combine):
    views, means = torch.randn(61, 5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    v, mu = F.normalize(views, dim=-1), F.normalize(means)
    scores = {
        "mean_feature": lambda: F.normalize(v.mean(1)) @ mu.T,
        "mean_score": lambda: (v @ mu.T).mean(1),
        "max_score": lambda: (v @ mu.T).amax(1),
        "vote": lambda: F.one_hot((v @ mu.T).argmax(2), 3).double().mean(1),
    }[combine]()
    found = dg.classify_views(views, means, combine=combine)
    top = scores.topk(2).values
    close(found.confidence, top[:, 0])
    close(found.margin, top[:, 0] - top[:, 1])
    assert torch.equal(found.prediction, scores.argmax(1))
    one = dg.classify_views(views[:, :1], means, combine=combine)
    assert torch.equal(one.prediction, dg.classify(views[:, 0], means).prediction)
    views[3, 2] = torch.nan
    assert dg.classify_views(views, means, combine=combine).confidence.isnan().nonzero().tolist() == [[3]]
