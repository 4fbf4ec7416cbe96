"""Rows of results: merging, files, and the report made from them."""

import json
from dataclasses import replace

import pytest

from benchmarks import aims, gpu, measure, report
from tests.support.benchmarks import cells, row, same
from tests.support.testing import ROOT


def test_merge_replaces_the_provider_of_a_case_on_its_device():
    old = [row(mode=mode) for mode in measure.MODES] + [row(provider="eager"), row(device="GPU B"), row(d=256)]
    old.append(replace(row(), threads=2))
    merged = report.merge(old, [row(note="out of memory")])
    assert merged == [*old[3:], row(note="out of memory")]


def test_results_without_kernel_counts_are_read(tmp_path):
    """Files of an earlier version have no such column."""
    report.write([row()], tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    del rows[0]["launches"]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert report.read(tmp_path) == [row()]


# The aims of clip at N = 32,768, D = 128: met exactly, missed in time, missed in gain, without a time of eager.
@pytest.mark.parametrize(
    ("ms", "eager", "met"), [(3.0, 15.0, "yes"), (3.1, 90.0, "no"), (2.9, 14.0, "no"), (2.9, None, "no")]
)
def test_report_says_whether_an_aim_is_met(ms, eager, met):
    rows = [row(ms=ms)] + ([row(provider="eager", ms=eager)] if eager else [])
    line = cells(aims.markdown(rows, {}, same, []), "clip", "32,768", "128")[0]
    assert line[3] == f"{ms:.3g}" and line[4] == "2.67" and line[11] == met
    assert line[6] == (f"{eager / ms:.1f}" if eager else "")


@pytest.mark.parametrize(("mib", "met"), [(244, "yes"), (245, "no")])
def test_report_holds_memory_to_megabytes(mib, met):
    """256 MB are 244.1 MiB."""
    line = cells(aims.markdown([row(n=65536, mib=mib)], {}, same, []), "clip", "65,536", "128")[0]
    assert line[11] == met


def test_report_of_limited_memory():
    rows = [row(n=65536, ms=10.0), row(n=65536, ms=11.0, provider="ours-128MB")]
    rows += [row(n=65536, d=256), row(n=65536, d=256, provider="ours-128MB", note="not available: no such function")]
    text = aims.markdown(rows, {}, same, [])
    section = text[text.index("### Scratch") : text.index("### Beside")]
    assert cells(section, "clip", "65,536", "128")[0][3:7] == ["10", "11", "10%", "≤ 15%"]
    assert cells(section, "clip", "65,536", "256")[0][4] == "not available"


def test_report_shows_every_provider_and_device():
    rows = [row(), row(provider="memeff", ms=5.0), row(device="GPU B", ms=4.0), row(n=256, ms=0.1, launches=17)]
    text = aims.markdown(rows, {"tests": {"summary": "3 passed", "status": 0}}, same, ["small"])
    first, second = text[text.index("## GPU A") : text.index("## GPU B")], text[text.index("## GPU B") :]
    assert cells(first, "clip", "32,768", "128", "memeff")[0][4:8] == ["5", "5–5", "", "2.5"]
    assert not cells(second, "clip", "32,768", "128", "memeff")
    assert cells(second, "clip", "32,768", "128", "ours")[0][4] == "4"
    assert cells(first, "clip", "256", "128")[0][3:5] == ["0.1", "17"]
    assert "- tests: 3 passed\n- not run: small\n" in text


def test_model_grows_with_the_pairs():
    assert aims.modelled_ms("clip", "ours", 65536, 512) == 30.1
    assert aims.modelled_ms("clip", "ours", 2**20, 512) == pytest.approx(256 * 30.1)
    assert aims.modelled_ms("siglip", "ours", 65536, 768) is None


def test_committed_report_is_that_of_its_folder():
    folder = ROOT / "benchmarks" / "results" / "gpu"
    finished = gpu._read_finished(folder)
    unfinished = [part for part in gpu.PARTS if part not in finished]
    text = aims.markdown(report.read(folder), finished, same, unfinished)
    assert (folder / "report.md").read_text() == text
