"""torch.compile: losses and modules become one graph, for every backend, at two sizes."""

import pytest
import torch
import torch.nn.functional as F

import contrastive_kernels as ck
from tests.support.testing import CASES, assert_outcomes_match, backends, device_of, differentiate

COMPILED = {
    "info_nce": {},
    "info_nce-shared": {"label_smoothing": 0.1},
    "nt_xent": {"cutoff_margin": 0.1},
    "clip": {},
    "nt_xent-polarized": {},
    "arcl": {},
}
PREFERRED = backends()[-1]  # what the others do differently is inside one opaque operator


SIZES = ((33, 17, 24), (40, 21, 24))  # the second makes the graph dynamic


def compiled_matches(case, backend, compiler, sizes=SIZES, **options):
    """Compare the compiled loss, whose forward is one graph, with the eager one."""
    torch._dynamo.reset()

    def loss(scale, **features):
        return case(ck, features, logit_scale=scale, backend=backend, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    device = device_of(backend)
    for shape in sizes:
        features = {**case.features(shape, torch.float32, device), "scale": torch.tensor(5.0, device=device)}
        ours, eager = differentiate(compiled, features), differentiate(loss, features)
        assert_outcomes_match(ours, eager, torch.float32, 5.0)


@pytest.mark.parametrize("backend", [PREFERRED])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph(name, backend):
    compiled_matches(CASES[name], backend, "aot_eager", **COMPILED[name])


@pytest.mark.parametrize("backend", backends()[:-1])
def test_every_backend_compiles(backend):
    compiled_matches(CASES["nt_xent-polarized"], backend, "aot_eager")


@pytest.mark.parametrize("backend", [PREFERRED])
def test_compiles_with_ids_weights_and_statistics(backend):
    torch._dynamo.reset()
    device = device_of(backend)
    z0, z1 = torch.randn(2, 33, 24, device=device)
    ids, weight = torch.arange(33, device=device) // 2, torch.rand(33, device=device)

    def loss(z0, z1):
        options = {"ids": ids, "weight": weight, "label_smoothing": 0.1, "return_stats": True}
        return ck.nt_xent_loss(z0, z1, **options, backend=backend)

    value, stats = torch.compile(loss, fullgraph=True, backend="aot_eager")(z0, z1)
    expected, statistics = loss(z0, z1)
    torch.testing.assert_close((value, *stats), (expected, *statistics))


@pytest.mark.parametrize("backend", [PREFERRED])
def test_compiles_with_inductor(backend):
    compiled_matches(CASES["nt_xent"], backend, "inductor", SIZES[:1])


@pytest.mark.parametrize("backend", [PREFERRED])
def test_module_compiles(backend):
    """MoCo writes its queue in the compiled graph."""
    torch._dynamo.reset()
    device = device_of(backend)
    loss = ck.MoCoLoss(dim=24, queue_size=64, backend=backend).to(device)
    reference = ck.MoCoLoss(dim=24, queue_size=64, backend=backend).to(device)
    reference.load_state_dict(loss.state_dict())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        query, key = torch.randn(2, 33, 24, device=device)
        torch.testing.assert_close(compiled(query, key), reference(query, key))
        torch.testing.assert_close(loss.queue, reference.queue)


def test_ids_that_serve_both_sides_compile(backend):
    """The same ids for rows and columns are one tensor, which Dynamo would refuse twice."""
    torch.compiler.reset()
    x, y = (F.normalize(torch.randn(12, 8, device=device_of(backend)), dim=1) for _ in range(2))
    ids = torch.arange(12, device=x.device) % 5

    def loss(x, y):
        return ck.clip_loss(x, y, 10.0, ids=ids, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
