"""Rows of results: merging, files, and the report made from them."""

import json
from dataclasses import replace

import pytest

from benchmarks import aims, cases, gpu, measure, report
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
    ("ms", "eager", "met"), [(2.2, 11.0, "yes"), (2.3, 90.0, "no"), (2.1, 10.0, "no"), (2.1, None, "no")]
)
def test_report_says_whether_an_aim_is_met(ms, eager, met):
    rows = [row(ms=ms)] + ([row(provider="eager", ms=eager)] if eager else [])
    text = aims.markdown(rows, {}, same, [])
    line = cells(text[text.index("### Aims") :], "clip", "32,768", "128")[0]
    predicted = aims.predicted_ms("clip", "ours", 32768, 128)
    assert line[3] == f"{ms:.3g}" and line[4] == f"{predicted:.3g}" and line[11] == met
    assert line[6] == (f"{eager / ms:.1f}" if eager else "")


@pytest.mark.parametrize(("mib", "met"), [(244, "yes"), (245, "no")])
def test_report_holds_memory_to_megabytes(mib, met):
    """256 MB are 244.1 MiB."""
    text = aims.markdown([row(n=65536, mib=mib)], {}, same, [])
    line = cells(text[text.index("### Aims") :], "clip", "65,536", "128")[0]
    assert line[11] == met


def test_report_of_limited_memory():
    rows = [row(n=65536, ms=10.0), row(n=65536, ms=11.0, provider="ours-128MB")]
    rows += [row(n=65536, d=256), row(n=65536, d=256, provider="ours-128MB", note="not available: no such function")]
    text = aims.markdown(rows, {}, same, [])
    section = text[text.index("### Scratch") : text.index("### Beside")]
    assert cells(section, "clip", "65,536", "128")[0][3:6] == ["10", "11", "10%"]
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


def test_predictions_are_parts_that_add_up():
    """Every row of the predictions has its aim, and its parts add up to its sum, before and after."""
    text = aims.markdown([], {}, same, [])
    section = text[text.index("## Predictions") : text.index("### Aims")]
    body = [line for line in cells(section) if line[0] in cases.LOSSES]
    assert len(body) == len(aims._PREDICTED)
    for line in body:
        for which in (0, -1):
            parts, device = line[4:9], line[9]
            values = [float(part.split(" → ")[which].replace(",", "")) if part else 0.0 for part in [*parts, device]]
            assert sum(values[:-1]) == pytest.approx(values[-1], rel=0.02), line
    assert cells(section, "clip", "32,768", "32,768", "512")[0][-1] == "≤ 7.5"


def test_committed_report_is_that_of_its_folder():
    folder = ROOT / "benchmarks" / "results" / "gpu"
    finished = gpu._read_finished(folder)
    unfinished = [part for part in gpu.PARTS if part not in finished]
    text = aims.markdown(report.read(folder), finished, same, unfinished)
    assert (folder / "report.md").read_text() == text
