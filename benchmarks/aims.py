"""The aims for a GPU, and the report of them and of the predictions of `gpu_model` beside the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import gpu_model, peers, report
from .cases import LOSSES
from .run import Row

DIMS = (128, 256, 512, 1024)
PAIR = ("clip", "nt_xent")
BATCH = (*PAIR, "info_nce")
AIM_N, LARGE_N, MILLION, QUERIES = 32768, 65536, 2**20, 256
SMALL_SIZES = (256, 512, 1024, 2048)
SMALL_PROVIDERS = ("ours", "graph", "ours-torch", "eager", "compile")
BASELINES = ("eager", "autocast", "compile", "linear_cross_entropy")
# Allowed ratio of the time of ours within 128 MB of scratch memory to its time without limit.
LIMITED_SLOWDOWN = 1.15


@dataclass(frozen=True)
class Aim:
    """An aim for ours on an H100 in bfloat16, forward + backward.

    At most ``ms`` and ``mb`` (10⁶ bytes beyond inputs and gradients), at least ``gain`` times as fast as eager;
    ``public`` is the best published figure.
    """

    loss: str
    n: int
    d: int
    provider: str = "ours"
    ms: float | None = None
    gain: float | None = None
    mb: float | None = None
    public: str = ""


_AT_AIM_N = {
    "clip": [(2.2, 5.0), (4.3, 3.5), (7.5, 2.4), (14.5, 1.6)],
    "nt_xent": [(1.2, 8.0), (2.2, 5.0), (3.9, 3.8), (7.5, 2.6)],
    "info_nce": [(2.1, None), (4.4, None), (7.5, None), (14.5, None)],
}
AIMS = [
    *(
        Aim(loss, AIM_N, d, ms=ms, gain=gain)
        for loss, aims in _AT_AIM_N.items()
        for d, (ms, gain) in zip(DIMS, aims, strict=True)
    ),
    *(
        Aim(loss, LARGE_N, d, ms=33.0 if (loss, d) == ("clip", 512) else None, mb=256 if d <= 128 else 1074)
        for loss in PAIR
        for d in DIMS
    ),
    Aim("siglip", LARGE_N, 768, ms=38.0, public="48.8 ms, 1,400 MB on a GH200"),
    Aim("siglip", LARGE_N, 768, "ours-512MB", ms=50.0, mb=640, public="54.3 ms, 640 MB on a GH200"),
    Aim("clip", MILLION, 512, ms=9000.0),
    Aim("moco", QUERIES, 128, ms=0.1),
    Aim("moco", QUERIES, 128, "graph", ms=0.1),
]


def predicted_ms(loss: str, provider: str, n: int, d: int) -> float | None:
    """Return the milliseconds that the model predicts; None outside the model."""
    seconds = gpu_model.seconds(loss, provider, n, LOSSES[loss].columns(n), d)
    return None if seconds is None else 1e3 * seconds


_EXPLANATION = (
    'Forward + backward, bfloat16, medians. "predicted" and "aim" belong to the measured column on their left: what a',
    "cost model of an H100 predicts (`benchmarks/gpu_model.py`, errors of 15 % are likely), and what an H100 should",
    "reach. Memory is beyond inputs and gradients, 1 MB = 10⁶ bytes. Public kernels",
    f"({', '.join(peers.KERNELS)}) have a row where they were installed.",
)
_PREDICTION = (
    "Milliseconds by the model, none measured: what the kernels were → what they are. They had few programs for few",
    "rows, most of them a multiprocessor to themselves, which hides nothing, and strips of rows for chunks. Device:",
    "the sum, what a CUDA graph takes; a call takes no less than its host time.",
)
# Where the predictions are shown part by part.
_PREDICTED = [
    *((loss, AIM_N, d) for loss in (*BATCH, "siglip") for d in DIMS),
    ("clip", LARGE_N, 512),
    ("siglip", LARGE_N, 768),
    ("clip", MILLION, 512),
    ("moco", QUERIES, 128),
    *(("clip", n, 128) for n in (*SMALL_SIZES, 4096, 8192)),
]


class Measured:
    """The timed rows of one device in bfloat16; ``size`` maps the N of an aim to the N that was run."""

    def __init__(self, rows: Iterable[Row], size: Callable[[int], int]) -> None:
        self.size = size
        both = [row for row in rows if row.mode == "both" and row.dtype == "bfloat16"]
        self.rows = {(row.loss, row.n, row.d, row.provider): row for row in report.timed(both)}
        self.left_out = {(row.loss, row.n, row.d, row.provider) for row in both if row.note}

    def row(self, loss: str, n: int, d: int, provider: str) -> Row | None:
        """Return the row of forward + backward, None without one."""
        return self.rows.get((loss, self.size(n), d, provider))

    def ms(self, loss: str, n: int, d: int, provider: str) -> float | None:
        """Return the median of that row."""
        row = self.row(loss, n, d, provider)
        return row.ms_50 if row else None

    def cell(self, loss: str, n: int, d: int, provider: str) -> str:
        """Return the median as text, ``"not available"`` if the provider could not run, empty if it was not tried."""
        tried = (loss, self.size(n), d, provider) in self.left_out
        return "not available" if tried else _number(self.ms(loss, n, d, provider))

    def providers(self, loss: str, n: int, d: int) -> list[str]:
        """Return the providers that were timed."""
        return [provider for *case, provider in self.rows if case == [loss, self.size(n), d]]


def markdown(
    rows: Sequence[Row], parts: Mapping[str, Mapping], size: Callable[[int], int], unfinished: Sequence[str]
) -> str:
    """Return the report; ``parts`` has the end of each finished part, ``size`` maps an N to the N that was run."""
    lines = ["# GPU results", ""]
    lines += [f"- {part}: {ended['summary']}" for part, ended in parts.items()]
    if unfinished:
        lines.append(f"- not run: {', '.join(unfinished)}")
    lines += ["", *_EXPLANATION]
    if size(AIM_N) != AIM_N:
        lines += ["", "**A rehearsal at reduced sizes: no figure here says anything about a GPU.**"]
    lines += ["", "## Predictions", "", *_PREDICTION, "", *_table(*_predictions())]
    devices = list(dict.fromkeys(row.device for row in rows)) or [None]
    for device in devices:
        own = [row for row in rows if row.device == device]
        lines += ["", f"## {_where(own[-1]) if own else 'Nothing has been measured: those columns are empty'}"]
        measured = Measured(own, size)
        for title, text, (headers, body) in (
            ("Aims", "", _aims(measured)),
            ("Scratch memory limited to 128 MB", "", _limited(measured)),
            ("Beside others", "", _others(measured)),
            ("Small batches", "Kernels: how many a forward + backward runs; a graph launches them all at once.",
             _small(measured)),
        ):  # fmt: skip
            lines += ["", f"### {title}", "", *([text, ""] if text else []), *_table(headers, body)]
        if left_out := report.not_timed(own):
            lines += ["", *(f"- {line}" for line in left_out)]
    return "\n".join(lines) + "\n"


def _where(row: Row) -> str:
    versions = f"torch {row.torch}, triton {row.triton or 'none'}, commit {row.commit or 'unknown'}, {row.date}"
    return f"{row.device}: {versions}"


def _table(headers: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rows = [headers, ["---"] * len(headers), *body]
    return [f"| {' | '.join(row)} |" for row in rows]


def _number(value: float | None, form: str = "") -> str:
    """Format with three digits, or by ``form``; empty for None."""
    if value is None:
        return ""
    return format(value, form or (",.0f" if value >= 100 else ".3g"))


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _at_most(value: float | None) -> str:
    return "" if value is None else f"≤ {value:,g}"


def _megabytes(row: Row | None) -> float | None:
    return row.peak_mib * report.MIB / 1e6 if row and row.peak_mib is not None else None


Rows = tuple[Sequence[str], list[list[str]]]


def _predictions() -> Rows:
    headers = ["loss", "N", "M", "D", "forward", "gradients or weights", "products", "sums of chunks", "small kernels",
               "device", "host", "call", "aim"]  # fmt: skip
    aims = {(aim.loss, aim.n, aim.d): aim.ms for aim in AIMS if aim.provider == "ours"}
    body = []
    for loss, n, d in _PREDICTED:
        m = LOSSES[loss].columns(n)
        steps = [gpu_model.step(loss, n, m, d, design) for design in (gpu_model.BEFORE, gpu_model.AFTER)]
        parts = ("sums", "gradients", "products", "traffic", "small", "device", "host", "total")
        cells = [" → ".join(dict.fromkeys(_number(1e3 * getattr(found, part)) for found in steps)) for part in parts]
        aim = _at_most(aims.get((loss, n, d)))
        body.append([loss, f"{n:,}", f"{m:,}", str(d), *("" if cell == "0" else cell for cell in cells), aim])
    return headers, body


def _aims(measured: Measured) -> Rows:
    headers = ["loss", "N", "D", "ms", "predicted", "aim", "× eager", "predicted", "aim",
               "extra MB", "aim", "met", "published"]  # fmt: skip
    body = []
    for aim in AIMS:
        case = aim.loss, aim.n, aim.d
        ms, mb = measured.ms(*case, aim.provider), _megabytes(measured.row(*case, aim.provider))
        predicted = predicted_ms(aim.loss, aim.provider, aim.n, aim.d)
        gain = _ratio(measured.ms(*case, "eager"), ms)
        predicted_gain = _ratio(predicted_ms(aim.loss, "eager", aim.n, aim.d), predicted) if aim.gain else None
        tests = [(ms, aim.ms, -1), (gain, aim.gain, 1), (mb, aim.mb, -1)]
        verdicts = [value is not None and value * sign >= limit * sign for value, limit, sign in tests if limit]
        body.append([
            aim.loss + ("" if aim.provider == "ours" else f" ({aim.provider})"), f"{measured.size(aim.n):,}",
            str(aim.d), measured.cell(*case, aim.provider), _number(predicted), _at_most(aim.ms),
            _number(gain, ".1f"), _number(predicted_gain, ".1f"), "" if aim.gain is None else f"≥ {aim.gain:g}",
            _number(mb), _at_most(aim.mb),
            "" if ms is None else "yes" if all(verdicts) else "no", aim.public,
        ])  # fmt: skip
    return headers, body


def _limited(measured: Measured) -> Rows:
    headers = ["loss", "N", "D", "ms", "ms within 128 MB", "slower", "predicted", "aim", "extra MB"]
    body = []
    for loss in PAIR:
        for d in DIMS:
            free, limited = (measured.ms(loss, LARGE_N, d, provider) for provider in ("ours", "ours-128MB"))
            slower = _ratio(limited, free)
            predicted = _ratio(*(predicted_ms(loss, provider, LARGE_N, d) for provider in ("ours-128MB", "ours")))
            mb = _megabytes(measured.row(loss, LARGE_N, d, "ours-128MB"))
            body.append([
                loss, f"{measured.size(LARGE_N):,}", str(d), _number(free),
                measured.cell(loss, LARGE_N, d, "ours-128MB"),
                "" if slower is None else f"{slower - 1:.0%}", f"{predicted - 1:.0%}",
                f"≤ {LIMITED_SLOWDOWN - 1:.0%}", _number(mb),
            ])  # fmt: skip
    return headers, body


def _others(measured: Measured) -> Rows:
    headers = ["loss", "N", "D", "", "ms", "20–80 %", "predicted", "ours is × as fast", "predicted", "extra MB",
               "of matmul"]  # fmt: skip
    body = []
    cases = [(loss, AIM_N, d, BASELINES) for loss in BATCH for d in DIMS]
    cases += [(loss, LARGE_N, d, ("compile",)) for loss in PAIR for d in DIMS]
    cases += [("siglip", LARGE_N, 768, ("compile",)), ("clip", MILLION, 512, ())]
    cases += [("moco", QUERIES, 128, ("graph", "eager", "compile"))]
    for loss, n, d, baselines in cases:
        ours, predicted_ours = measured.ms(loss, n, d, "ours"), predicted_ms(loss, "ours", n, d)
        expected = [name for name in baselines if name != "linear_cross_entropy" or name in LOSSES[loss].others]
        for provider in dict.fromkeys(["ours", *expected, *measured.providers(loss, n, d)]):
            row, predicted = measured.row(loss, n, d, provider), predicted_ms(loss, provider, n, d)
            itself = provider == "ours"
            body.append([
                loss, f"{measured.size(n):,}", str(d), provider, measured.cell(loss, n, d, provider),
                f"{_number(row.ms_20)}–{_number(row.ms_80)}" if row else "", _number(predicted),
                "" if itself else _number(_ratio(row and row.ms_50, ours), ".1f"),
                "" if itself else _number(_ratio(predicted, predicted_ours), ".1f"), _number(_megabytes(row)),
                f"{row.matmul_fraction:.0%}" if row and row.matmul_fraction else "",
            ])  # fmt: skip
    return headers, body


def _small(measured: Measured) -> Rows:
    headers = ["loss", "N", "D"]
    for provider in SMALL_PROVIDERS:
        headers += [f"{provider} ms", "kernels"]
    body = []
    for loss in PAIR:
        for n in SMALL_SIZES:
            cells = [loss, f"{measured.size(n):,}", "128"]
            for provider in SMALL_PROVIDERS:
                row = measured.row(loss, n, 128, provider)
                cells += [measured.cell(loss, n, 128, provider), _number(row and row.launches, "d")]
            body.append(cells)
    return headers, body
