"""Bad input raises the exact exception, which names the argument and its fault, before any kernel starts."""

import math
import os
import re
import warnings

import numpy as np
import pytest
import torch

import contrastive_kernels as ck
import contrastive_kernels.diagnostics
from contrastive_kernels.engine.backends import BACKENDS
from tests.support.testing import CASES, SOFTMAX, case_params
from tests.support.variants import EVERY

N, D = 8, 16
meta = torch.device("meta")


def f(*shape, **options):
    return torch.randn(*shape, **options)


def ids(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


def info_nce(*inputs, **options):
    return ck.info_nce_loss(*(inputs or (f(N, D), f(N, D))), **options)


BAD = {
    # shapes
    "rows differ": (
        lambda: ck.info_nce_loss(f(8, 128), f(7, 128)),
        ValueError,
        "query (8, 128) and positive_key (7, 128) must have the same first dimension",
    ),
    "dimensions differ": (
        lambda: ck.nt_xent_loss(f(8, 16), f(8, 17)),
        ValueError,
        "z0 (8, 16) and z1 (8, 17) must have the same last dimension",
    ),
    "clip rows differ": (
        lambda: ck.clip_loss(f(8, 16), f(4, 16), 1.0),
        ValueError,
        "image_features (8, 16) and text_features (4, 16) must have the same first dimension",
    ),
    "queue of columns": (
        lambda: ck.moco_loss(f(8, 16), f(8, 16), f(16, 32)),
        ValueError,
        "queue (16, 32) must have the same last dimension; queue holds its rows as columns, pass queue.T",
    ),
    "support set of columns": (
        lambda: ck.nnclr_loss(f(8, 16), f(8, 16), f(16, 32)),
        ValueError,
        "support holds its rows as columns, pass support.T",
    ),
    "queue of another dimension": (
        lambda: ck.moco_loss(f(8, 16), f(8, 16), f(32, 15)),
        ValueError,
        "query (8, 16) and queue (32, 15) must have the same last dimension",
    ),
    "a vector": (lambda: ck.nt_xent_loss(f(8), f(8)), ValueError, "z0 (8,) must have shape (N, D)"),
    "three dimensions": (
        lambda: ck.info_nce_loss(f(8, 2, 4), f(8, 2, 4)),
        ValueError,
        "query (8, 2, 4) must have shape (N, D)",
    ),
    "two dimensions for views": (
        lambda: ck.arcl_loss(f(8, 16)),
        ValueError,
        "views (8, 16) must have shape (N, V, D)",
    ),
    "one view": (lambda: ck.arcl_loss(f(8, 1, 16)), ValueError, "views (8, 1, 16) must have at least 2 views"),
    "keys of other samples": (
        lambda: ck.moco_arcl_loss(f(8, 16), f(7, 3, 16), f(9, 16)),
        ValueError,
        "query (8, 16) and keys (7, 3, 16) must have the same first dimension",
    ),
    "paired negatives for shared": (
        lambda: info_nce(f(8, 16), f(8, 16), f(8, 3, 16)),
        ValueError,
        "negative_keys (8, 3, 16) are each query's own, (N, M, D), which negative_mode='paired' takes",
    ),
    "shared negatives for paired": (
        lambda: info_nce(f(8, 16), f(8, 16), f(5, 16), negative_mode="paired"),
        ValueError,
        "negative_keys (5, 16) are shared, (M, D), which negative_mode='unpaired' takes",
    ),
    "no own negatives": (
        lambda: info_nce(f(8, 16), f(8, 16), f(8, 0, 16), negative_mode="paired"),
        ValueError,
        "negative_keys (8, 0, 16) must have at least 1 rows",
    ),
    "no negatives at all": (lambda: info_nce(in_batch_negatives=False), ValueError, "negative_keys"),
    "symmetric without the batch": (
        lambda: info_nce(f(8, 16), f(8, 16), f(5, 16), symmetric=True),
        ValueError,
        "symmetric",
    ),
    "primitive": (
        lambda: ck.similarity_logsumexp(f(8, 16), f(9, 15)),
        ValueError,
        "x (8, 16) and y (9, 15) must have the same last dimension",
    ),
    "primitive of a vector": (lambda: ck.similarity_sum(f(8), term=ck.Square()), ValueError, "x (8,)"),
    "views of a matrix": (lambda: ck.min_view_similarity(f(8, 16)), ValueError, "views (8, 16)"),
    # empty batches
    "empty batch": (lambda: info_nce(f(0, 16), f(0, 16)), ValueError, "query (0, 16) is an empty batch"),
    "empty views": (lambda: ck.arcl_loss(f(0, 2, 16)), ValueError, "views (0, 2, 16) is an empty batch"),
    "empty two views": (lambda: ck.nt_xent_loss(f(0, 16), f(0, 16)), ValueError, "z0 (0, 16) is an empty batch"),
    "empty clip": (lambda: ck.clip_loss(f(0, 16), f(0, 16), 1.0), ValueError, "image_features (0, 16) is an empty"),
    "empty polarization": (lambda: ck.distance_polarization(f(0, 16)), ValueError, "z (0, 16) is an empty batch"),
    # dtypes
    "integer features": (lambda: info_nce(f(8, 16).long(), f(8, 16)), TypeError, "query has dtype torch.int64"),
    "bool features": (lambda: ck.nt_xent_loss(f(8, 16) > 0, f(8, 16) > 0), TypeError, "z0 has dtype torch.bool"),
    "complex features": (
        lambda: ck.arcl_loss(f(8, 2, 16).to(torch.complex64)),
        TypeError,
        "views has dtype torch.complex64",
    ),
    "mixed features": (
        lambda: info_nce(f(8, 16), f(8, 16).double()),
        TypeError,
        "query is torch.float32 and positive_key is torch.float64",
    ),
    "a list": (lambda: ck.nt_xent_loss([[1.0]], f(1, 1)), TypeError, "z0 must be a tensor, not list"),
    "float ids": (lambda: info_nce(query_ids=f(8)), TypeError, "query_ids has dtype torch.float32"),
    "bool ids": (lambda: ck.nt_xent_loss(f(8, 16), f(8, 16), ids=f(8) > 0), TypeError, "ids has dtype torch.bool"),
    "float ids of a primitive": (
        lambda: ck.similarity_logsumexp(f(8, 16), x_ids=f(8)),
        TypeError,
        "x_ids has dtype torch.float32",
    ),
    "integer weight": (lambda: info_nce(weight=ids(8)), TypeError, "weight has dtype torch.int64"),
    "temperature of an array": (
        lambda: info_nce(temperature=np.ones(1)),
        TypeError,
        "temperature must be a number or a tensor, not ndarray",
    ),
    "temperature of a NumPy flag": (
        lambda: info_nce(temperature=np.bool_(True)),
        TypeError,
        "temperature must be a number or a tensor, not bool",
    ),
    "held and called temperature": (
        lambda: ck.NTXentLoss(0.1)(f(8, 16), f(8, 16), temperature=0.2),
        TypeError,
        "NTXentLoss holds temperature=0.1, and the call gives temperature again",
    ),
    "held and called weight": (
        lambda: ck.InfoNCELoss(weight=f(8))(f(8, 16), f(8, 16), weight=f(8)),
        TypeError,
        "InfoNCELoss holds weight, and the call gives weight again",
    ),
    "normalize of a queue's call": (
        lambda: ck.MoCoLoss(16, 8)(f(8, 16), f(8, 16), normalize=True),
        TypeError,
        "give normalize to the constructor",
    ),
    "temperature of a string": (lambda: info_nce(temperature="warm"), TypeError, "temperature must be a number"),
    "term of a string": (lambda: ck.similarity_sum(f(8, 16), term="square"), TypeError, "term must be a Term"),
    # devices
    "mixed devices": (
        lambda: info_nce(f(8, 16), f(8, 16, device=meta)),
        RuntimeError,
        "query is on cpu and positive_key on meta",
    ),
    "ids elsewhere": (lambda: info_nce(query_ids=ids(8).to(meta)), RuntimeError, "query_ids is on meta"),
    "weight elsewhere": (lambda: info_nce(weight=f(8, device=meta)), RuntimeError, "weight is on meta"),
    # vectors
    "ids too short": (lambda: info_nce(query_ids=ids(7)), ValueError, "query_ids (7,) must have shape (8,)"),
    "two-view ids per row": (
        lambda: ck.nt_xent_loss(f(8, 16), f(8, 16), ids=ids(16)),
        ValueError,
        "ids (16,) must have shape (8,)",
    ),
    "one of two ids": (lambda: ck.similarity_logsumexp(f(8, 16), f(9, 16), x_ids=ids(8)), ValueError, "y_ids is not"),
    "same ids without ids": (lambda: ck.similarity_logsumexp(f(8, 16), same=True), ValueError, "x_ids is not"),
    "ids of y without y": (lambda: ck.similarity_logsumexp(f(8, 16), y_ids=ids(8)), ValueError, "y_ids is given"),
    "queue without ids": (
        lambda: ck.moco_arcl_loss(f(8, 16), f(8, 3, 16), f(9, 16), query_ids=ids(8)),
        ValueError,
        "query_ids and key_ids",
    ),
    "sparse ids": (
        lambda: info_nce(query_ids=ids(8).to_sparse()),
        TypeError,
        "query_ids has layout torch.sparse_coo; expected a dense tensor",
    ),
    "sparse rows of a primitive": (
        lambda: ck.similarity_sum(f(8, 16).to_sparse(), term=ck.Square()),
        TypeError,
        "x has layout torch.sparse_coo; expected a dense tensor",
    ),
    "sparse features of a diagnostic": (
        lambda: ck.diagnostics.class_means(f(8, 16).to_sparse(), ids(8), 2),
        TypeError,
        "features has layout torch.sparse_coo; expected a dense tensor",
    ),
    "reduction of a diagnostic without loss": (
        lambda: ck.diagnostics.mmcl_dual(f(8, 16), reduction="sum"),
        ValueError,
        "reduction has no effect",
    ),
    "backend of the mean view": (
        lambda: ck.min_view_similarity(f(8, 2, 16), reduce="mean", backend="cuda"),
        ValueError,
        "backend 'cuda' is unknown",
    ),
    "weight too long": (lambda: info_nce(weight=f(9)), ValueError, "weight (9,) must have shape (8,)"),
    "cutoff too long": (lambda: info_nce(cutoff=f(9)), ValueError, "cutoff (9,) must have shape (8,)"),
    "bias of another length": (
        lambda: ck.similarity_logsumexp(f(8, 16), f(9, 16), y_bias=f(8)),
        ValueError,
        "y_bias (8,) must have shape (9,)",
    ),
    # options
    "temperature zero": (lambda: info_nce(temperature=0.0), ValueError, "temperature 0.0"),
    "temperature tiny": (lambda: ck.arcl_loss(f(8, 2, 16), temperature=-1e-9), ValueError, "temperature -1e-09"),
    "temperature of two": (lambda: info_nce(temperature=f(2)), ValueError, "temperature (2,)"),
    "both scales": (lambda: info_nce(temperature=0.1, logit_scale=10.0), ValueError, "temperature and logit_scale"),
    "no scale": (lambda: ck.clip_loss(f(8, 16), f(8, 16)), ValueError, "logit_scale"),
    "both cutoffs": (lambda: info_nce(cutoff=0.1, cutoff_margin=0.1), ValueError, "cutoff and cutoff_margin"),
    "reduction": (lambda: info_nce(reduction="average"), ValueError, "reduction 'average' is unknown"),
    "reduction of another loss": (lambda: info_nce(reduction="row"), ValueError, "reduction 'row' is unknown"),
    "negative mode": (lambda: info_nce(negative_mode="all"), ValueError, "negative_mode 'all' is unknown"),
    "denominator": (
        lambda: ck.arcl_loss(f(8, 2, 16), denominator="three_view"),
        ValueError,
        "denominator 'three_view' is unknown",
    ),
    "positive": (lambda: ck.arcl_loss(f(8, 2, 16), positive="max"), ValueError, "positive 'max' is unknown"),
    "reduce": (lambda: ck.min_view_similarity(f(8, 2, 16), reduce="max"), ValueError, "reduce 'max' is unknown"),
    "label smoothing": (lambda: info_nce(label_smoothing=1.5), ValueError, "label_smoothing 1.5"),
    "band upside down": (lambda: ck.distance_polarization(f(8, 16), lower=0.5, upper=0.1), ValueError, "lower 0.5"),
    "band beyond the sphere": (lambda: ck.Band(0.1, 1.5), ValueError, "upper 1.5"),
    **{
        f"polarization of another type: {name}": (
            lambda loss=loss: loss(f(8, 16), f(8, 16), polarization=(0.1, 0.5, 1.0)),
            TypeError,
            "polarization must be a Polarization, not tuple",
        )
        for name, loss in ck.LMCLLoss.BASES.items()
    },
    "polarization of a text": (
        lambda: ck.Polarization("0.1"),
        TypeError,
        "lower must be a number or a tensor, not str",
    ),
    "polarization by a tensor": (
        lambda: ck.Polarization(weight=torch.ones(())),
        TypeError,
        "weight must be a number, not Tensor",
    ),
    "band of a text": (lambda: ck.distance_polarization(f(8, 16), upper="0.5"), TypeError, "upper must be a number"),
    "polarization upside down": (lambda: ck.Polarization(0.5, 0.1), ValueError, "lower 0.5"),
    "columns with a bias": (
        lambda: ck.similarity_logsumexp(f(8, 16), f(9, 16), y_bias=f(9), columns=True),
        ValueError,
        "columns",
    ),
    "backend": (lambda: info_nce(backend="cuda"), ValueError, "backend 'cuda' is unknown"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert message in str(caught.value)


def test_environment_variable_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("CONTRASTIVE_KERNELS_BACKEND", "imaginary")
    with pytest.raises(ValueError, match="CONTRASTIVE_KERNELS_BACKEND='imaginary' is unknown"):
        info_nce()
    monkeypatch.setenv("CONTRASTIVE_KERNELS_BACKEND", "torch")
    x = f(N, D)
    assert torch.equal(ck.nt_xent_loss(x, x + 1), ck.nt_xent_loss(x, x + 1, backend="torch"))
    # the argument wins over the environment
    with pytest.raises(ValueError, match="backend 'other' is unknown"):
        info_nce(backend="other")


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_a_missing_backend_says_why(name, monkeypatch):
    """The message lists every backend with its reasons; no other backend is taken silently."""
    monkeypatch.setattr(BACKENDS[name], "not_supported_reasons", lambda x: ["it was never built"])
    with pytest.raises(NotImplementedError) as caught:
        info_nce(backend=name)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"backend {name!r} does not support this input:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(BACKENDS)
    assert "it was never built" in str(caught.value)
    # without a request, the next backend that can run serves
    assert info_nce().isfinite()


@pytest.mark.skipif(torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="triton can run")
def test_triton_on_the_cpu_says_why():
    with pytest.raises(NotImplementedError, match="backend 'triton' does not support this input"):
        info_nce(backend="triton")


@pytest.mark.parametrize("case", case_params(CASES))
def test_an_unknown_option_is_a_type_error(case):
    with pytest.raises(TypeError, match="tau"):
        case(ck, case.features((4, 4, 4)), tau=0.1)


SCALED = {name: case for name, case in EVERY.items() if case.takes("temperature") and case.takes("logit_scale")}


@pytest.mark.parametrize("case", case_params(SCALED))
def test_a_negative_temperature_is_refused(case):
    """It pulls the negatives and pushes the positives. Who means it gives the scale."""
    features = case.features((8, 4, 4))
    options = {name: value for name, value in case.options.items() if name not in ("temperature", "logit_scale")}
    with pytest.raises(ValueError, match=r"temperature -0[.]1 must be positive; pass logit_scale=-10[.]0 if"):
        getattr(ck, case.loss)(**features, **options, temperature=-0.1)
    getattr(ck, case.loss)(**features, **options, logit_scale=-10.0)


@pytest.mark.parametrize("case", case_params({k: v for k, v in SOFTMAX.items() if v.scale == "temperature"}))
def test_a_temperature_tensor_is_not_read(case):
    """A zero temperature in a tensor gives inf or NaN, no error: a check would have to wait for a GPU."""
    features = case.features((4, 4, 4), torch.float32)
    assert not math.isfinite(case(ck, features, temperature=torch.zeros(())))


def test_an_option_at_its_default_may_come_with_the_call():
    z = f(2, N, D)
    loss, stats = ck.ClipLoss(normalize=True)(*z, 5.0, return_stats=True)
    assert torch.equal(loss, ck.clip_loss(*z, 5.0, normalize=True)) and stats.lse.shape == (2, N)
    queue = ck.MoCoLoss(D, 4).eval()
    assert torch.equal(queue(*z, temperature=0.3), ck.moco_loss(*z, queue.queue, temperature=0.3))


VIEWS_FIRST = {
    "nt_xent": lambda views: ck.nt_xent_loss(views),
    "false_negative": lambda views: ck.false_negative_loss(views, threshold=0.5),
    "sup_con": lambda views: ck.sup_con_loss(views),
    "arcl": lambda views: ck.arcl_loss(views),
    "moco_arcl": lambda views: ck.moco_arcl_loss(views[:, 0], views, f(9, views.shape[2])),
    "alignment": lambda views: ck.alignment_loss(views),
    "augmentation_robust": lambda views: ck.augmentation_robust_loss(views),
    "min_view_similarity": lambda views: ck.min_view_similarity(views),
    "module": lambda views: ck.NTXentLoss()(views),
}
MANY_VIEWS = r"is 24 views of 2 samples.*transpose\(0, 1\)"


def files_of(record):
    """Return the files that these warnings name; that of a missing C++ backend may be beside them."""
    return [warning.filename for warning in record if re.search(MANY_VIEWS, str(warning.message))]


@pytest.mark.parametrize("name", VIEWS_FIRST)
def test_views_before_samples_are_warned_of(name):
    """Once, at the line of the user."""
    loss = VIEWS_FIRST[name]
    views = f(2, 24, 3)
    with pytest.warns(UserWarning, match=MANY_VIEWS) as record:
        loss(views)
    assert files_of(record) == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(views.transpose(0, 1))
        loss(f(2, 9, 3))  # nine views of a small last batch
        info_nce(f(2, 3), f(2, 3), f(2, 24, 3), negative_mode="paired")


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_views_before_samples_are_warned_of(dynamic):
    """Where the sizes are known."""
    torch._dynamo.reset()
    loss = torch.compile(ck.AlignmentLoss(), backend="eager", fullgraph=True, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        loss(f(2, 24, 3))
    assert files_of(record) == ([] if dynamic else [__file__])


def test_a_queue_shows_what_it_was_made_with():
    assert repr(ck.MoCoLoss(4, 8, 0.2)) == "MoCoLoss(dim=4, queue_size=8, temperature=0.2)"
    shown = "NNCLRLoss(dim=4, queue_size=8, temperature=0.2, normalize=False)"
    assert repr(ck.NNCLRLoss(4, 8, 0.2, normalize=False)) == shown
    assert "normalize" not in repr(ck.MoCoArCLLoss(4, 8))


def test_a_module_holds_python_numbers():
    """Dynamo would take a number of NumPy for an array."""
    module = ck.FalseNegativeLoss(np.float32(0.5), top_k=np.int64(2))
    assert (type(module.temperature), type(module.top_k)) == (float, int)
    x = f(N, D)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x + 1), module(x, x + 1))
