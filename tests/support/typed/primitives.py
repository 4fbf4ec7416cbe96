"""The primitives: a loss of one's own."""

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import assert_type

import contrastive_kernels as ck

x, y = normalize(torch.randn(8, 4), dim=1).requires_grad_(), normalize(torch.randn(6, 4), dim=1)
views = normalize(torch.randn(8, 3, 4), dim=2)

assert_type(ck.similarity_logsumexp(x, y, scale=10.0), Tensor)
assert_type(ck.diagnostics.alignment(x, x), Tensor)
ck.distributed.set_shards(None)
rows, columns = ck.similarity_logsumexp(x, y, scale=torch.tensor(10.0), columns=True)
assert_type(columns, Tensor)
for term in (
    ck.Band(0.1, 0.5),
    ck.Count(),
    ck.DistanceHinge(0.5),
    ck.Hinge(torch.zeros(8)),
    ck.Identity(),
    ck.Softplus(10.0, -10.0),
    ck.Square(),
    ck.Student(3.0),
):
    assert_type(ck.similarity_sum(x, y, term=term), Tensor)
assert_type(ck.similarity_sum(x, term=ck.Gaussian(), x_ids=torch.arange(8), reduction="sum"), Tensor)
assert_type(ck.similarity_logsumexp(x, y, guide=(x, y), guide_cutoff=0.5), Tensor)
assert_type(ck.similarity_softmax_mean(x, y, y, scale=10.0), Tensor)
values, chosen = ck.row_select(x, y, 3, largest=False)
assert_type(chosen, Tensor)
least, pairs = ck.min_view_similarity(views)
assert_type(least, Tensor)
assert_type(pairs, Tensor | None)

ck.set_workspace_limit(1 << 20)
assert_type(ck.workspace_limit(), int)
ck.set_workspace_limit(None)
ck.set_saved_scores_limit(None)
assert_type(ck.saved_scores_limit(), int | None)


def decoupled_loss(z0: Tensor, z1: Tensor, temperature: float = 0.1) -> Tensor:
    z = normalize(torch.cat([z0, z1]), dim=1)
    ids = torch.arange(len(z0)).repeat(2)
    negatives = ck.similarity_logsumexp(z, scale=1 / temperature, x_ids=ids)
    return (negatives - (z * z.roll(len(z0), 0)).sum(1) / temperature).mean()


decoupled_loss(x, x.detach())
