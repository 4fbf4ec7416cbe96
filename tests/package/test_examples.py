"""The example programs, in a reduced form: they run, and their claims hold."""

import numpy as np
import pytest
import torch

for package in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(package)

from examples import digits, large_batch, own_loss, papers, tables  # noqa: E402, only once its packages are known to be there

STEPS, BATCH_SIZE = 10, 128


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the result of a short training, and the path of its picture."""
    folder = tmp_path_factory.mktemp("digits")
    options = ["--steps", STEPS, "--batch-size", BATCH_SIZE, "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "FEW_DRAWS", 2)
        return digits.main([str(option) for option in options]), folder / "digits.png"


def test_digits_dense_and_fused_give_one_curve(trained):
    result, _ = trained
    assert len(result.relative_difference()) == STEPS
    assert result.relative_difference().max() < 1e-5


@pytest.mark.parametrize("name", digits.LOSSES)
def test_digits_loss_goes_down(trained, name):
    losses = trained[0].runs[name].losses
    assert np.isfinite(losses).all()
    assert min(losses[-3:]) < losses[0] - 0.2


def test_digits_losses_differ(trained):
    """Different losses have different curves: the curves above agree because they show one loss."""
    fused, polarized, arcl = (
        np.array(trained[0].runs[name].losses) for name in (digits.FUSED, digits.POLARIZED, digits.ARCL)
    )
    assert (np.abs(polarized - fused) > 1e-3).all()
    assert (np.abs(arcl - fused) > 1e-2).all()


def test_digits_probes_and_picture(trained):
    result, picture = trained
    assert set(result.probes) == {"raw pixels", "untrained encoder", *digits.LOSSES}
    for probe in result.probes.values():
        # ten classes: chance is 0.1; augmented images are harder
        assert 0.8 < probe.clean <= 1
        assert 0.2 < probe.augmented < probe.clean
        assert 0.4 < probe.few < probe.clean
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000


def test_digits_augment_keeps_the_digit_and_changes_it():
    images = digits.load(0).train[:256]
    first, second = (digits.augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    again = digits.augment(images, torch.Generator().manual_seed(0))
    assert first.shape == images.shape
    assert torch.equal(first, again)
    distances = torch.cdist(first.flatten(1), second.flatten(1))
    own, others = distances.diagonal(), distances.mean(1)
    assert (own > 0.5).all()
    assert own.mean() < 0.9 * others.mean()


def test_digits_refuses_a_batch_beyond_the_data(capsys, tmp_path):
    with pytest.raises(SystemExit):
        digits.main(["--batch-size", "5000", "--output", str(tmp_path)])
    assert "from 2 to 1347" in capsys.readouterr().err


def test_own_loss_is_the_dense_formula(capsys):
    differences, peaks = own_loss.main(["--size", "4096"])
    assert set(differences) == {"loss", *(f"gradient of {name}" for name in ("users", "items", "log_q", "temperature"))}
    assert max(differences.values()) < 1e-12
    matrix = 4096**2 * 4 / 2**20
    assert peaks["ours"] < matrix / 4
    assert peaks["dense"] > matrix
    assert "N = 4,096" in capsys.readouterr().out


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """Return the runs of a short training, and the path of its picture."""
    folder = tmp_path_factory.mktemp("large_batch")
    options = ["--batch-sizes", 256, 768, "--chunk-size", 64, "--steps", 20, "--output", folder]
    return large_batch.main([str(option) for option in options]), folder / "large_batch.png"


def test_large_batch_chunks_give_one_curve(batches):
    runs, picture = batches
    assert set(runs) == {(n, chunks) for n in (256, 768) for chunks in (False, True)}
    for n in (256, 768):
        whole, chunked = (np.array(runs[n, chunks].losses) for chunks in (False, True))
        assert len(whole) == 20
        assert (np.abs(chunked - whole) / whole).max() < 1e-4
        assert min(whole[-3:]) < whole[0] - 0.2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_large_batch_memory_is_that_of_a_chunk(batches):
    runs, _ = batches
    assert runs[768, False].peak_mib > 2.5 * runs[256, False].peak_mib
    assert runs[768, True].peak_mib < 2 * runs[256, True].peak_mib
    assert runs[768, True].peak_mib < runs[768, False].peak_mib / 4


def test_large_batch_learns(batches):
    """Chance is one in 450; what was learned in chunks is what was learned without."""
    runs, _ = batches
    for run in runs.values():
        assert 0.02 < run.accuracy < 1
    assert runs[768, True].accuracy == pytest.approx(runs[768, False].accuracy, abs=0.02)


def test_large_batch_leaves_out_what_does_not_fit(tmp_path):
    options = ["--batch-sizes", "256", "--chunk-size", "32", "--steps", "1", "--memory-limit", "2"]
    runs = large_batch.main([*options, "--output", str(tmp_path)])
    assert runs[256, False] is None
    assert runs[256, True].peak_mib < 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the findings of the reproductions in a short form, and the path of their picture."""
    folder = tmp_path_factory.mktemp("papers")
    return papers.main(["--steps", "150", "--output", str(folder)]), folder / "papers.png"


@pytest.mark.parametrize("name", papers.EXPERIMENTS)
def test_papers_predict_what_is_measured(name, found):
    """Also I19 counter-example: a small alignment loss and a large risk."""
    for finding in found[0][name]:
        assert finding.holds, finding


def test_papers_draw_a_picture(found):
    assert found[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("predicted", "measured", "holds"),
    [
        *(("> 1", 1.1, True), ("> 1", 0.9, False), ("< 1", 0.9, True), ("< 1", 1.1, False)),
        *((2.0, 2.19, True), (2.0, 2.21, False), (-2.0, -1.81, True), (0.0, 0.019, True), (0.0, 0.021, False)),
    ],
)
def test_papers_judge(predicted, measured, holds):
    assert papers.Finding("", predicted, measured).holds == holds


@pytest.fixture(scope="module")
def literature(tmp_path_factory):
    """Return the tables of some methods after the shortest training, and the path of their picture."""
    folder = tmp_path_factory.mktemp("tables")
    options = ["--steps", 1, "--batch-size", 64, "--seeds", 1, "--output", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "METHODS", {name: tables.METHODS[name] for name in ("SimCLR", "SimSiam")})
        patch.setattr(digits, "FEW_DRAWS", 2)
        return tables.main([str(option) for option in options]), folder / "tables.png"


def test_tables_have_an_entry_for_every_training(literature):
    found, picture = literature
    assert [(o.name, len(o.entries)) for o in found["augmentations"]] == [("SimCLR", 5), ("SimSiam", 5)]
    assert [len(o.entries) for o in found["views"]] == [1, len(tables.VIEWS)]
    assert [len(o.entries) for o in found["margin"].outcomes] == [2, 2, 2, 2]
    outcomes = [*found["augmentations"], *found["views"], *found["margin"].outcomes[::2]]
    for entry in (entry for outcome in outcomes for entry in outcome.entries):
        assert len(entry.accuracies) == 1
        assert 15 < entry.mean < 100  # chance is 10
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_margin_is_what_differs(literature):
    """The regulariser alone: the same seeds, batches and views."""
    distances = literature[0]["margin"].distances
    for name in ("SimCLR", "InfoNCE"):
        base, margin = distances[name], distances[f"{name} + margin"]
        assert base.shape == margin.shape
        assert not np.array_equal(base, margin)
        (in_the_band,) = (o.entries for o in literature[0]["margin"].outcomes if o.name == f"{name}, in the band")
        for entry, distances_of in zip(in_the_band, (base, margin), strict=True):
            inside = (distances_of > tables.BAND.lower) & (distances_of < tables.BAND.upper)
            assert entry.mean == pytest.approx(100 * inside.mean())


def test_tables_judge_by_the_differences_of_equal_seeds():
    entry = tables.Entry
    base, better = entry((80.0, 90.0)), entry((81.0, 91.2))  # far from each other, each as much better
    assert tables.verdict(better, base) == "holds: +1.1 ± 0.1"
    assert tables.verdict(base, better) == "does not hold: -1.1 ± 0.1"
    assert tables.verdict(entry((84.0, 88.0)), base) == "within the spread: +1.0 ± 3.0"
    assert tables.verdict(entry((84.0,)), entry((83.5,))) == "+0.5, one seed"


def test_tables_entries_have_a_spread():
    entry = tables.Entry((80.0, 82.0, 84.0))
    assert (entry.mean, entry.spread, str(entry)) == (82.0, 2.0, "82.0 ± 2.0")
    assert tables.Entry((80.0,)).spread == 0


@pytest.mark.parametrize("name", [*tables.METHODS, "ArCL", "margin"])
def test_tables_learners_learn(name):
    """Every method lowers its loss; MoCo's rises at first, while keys take the place of the random ones."""
    method = {**tables.METHODS, "ArCL": tables.arcl, "margin": tables.simclr_margin}[name]
    data = digits.load(0)
    learner, generator = tables.Learner(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], tables.LEARNING_RATE)
    losses = []
    for _ in range(12):
        loss = method(learner, torch.stack([digits.augment(data.train[:128], generator) for _ in range(2)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first = losses.index(max(losses)) if name == "MoCo" else 0
    assert first < 10
    assert min(losses[-3:]) < losses[first]


def test_digits_augment_leaves_out_what_is_not_asked_for():
    images = digits.load(0).train[:32]
    nothing = digits.augment(images, torch.Generator().manual_seed(0), ())
    torch.testing.assert_close(nothing, images, rtol=0, atol=1e-5)
    for change in digits.CHANGES:
        one = digits.augment(images, torch.Generator().manual_seed(0), (change,))
        assert (one - images).abs().amax() > 0.05, change


def test_papers_findings_are_not_the_predictions(found):
    """Measured values differ from predictions by sampling and training: they are measured."""
    numbers = [
        f for findings in found[0].values() for f in findings if not isinstance(f.predicted, str) and f.predicted
    ]
    assert all(f.measured != f.predicted for f in numbers)
