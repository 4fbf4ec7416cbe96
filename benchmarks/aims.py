"""The aims for a GPU, the predictions of a cost model, and the report of both beside the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import peers, report
from .run import Row

DIMS = (128, 256, 512, 1024)
PAIR = ("clip", "nt_xent")
AIM_N, LARGE_N, MILLION = 32768, 65536, 2**20
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
    "clip": [(3.0, 5.0), (4.5, 3.5), (8.0, 2.4), (15.5, 1.6)],
    "nt_xent": [(1.8, 8.0), (2.5, 5.0), (4.5, 3.8), (8.5, 2.6)],
}
AIMS = [
    *(
        Aim(loss, AIM_N, d, ms=ms, gain=gain)
        for loss, aims in _AT_AIM_N.items()
        for d, (ms, gain) in zip(DIMS, aims, strict=True)
    ),
    *(
        Aim(loss, LARGE_N, d, ms=33.0 if (loss, d) == ("clip", 512) else None, mb=256 if d <= 256 else 1074)
        for loss in PAIR
        for d in DIMS
    ),
    Aim("siglip", LARGE_N, 768, ms=38.0, public="48.8 ms, 1,400 MB on a GH200"),
    Aim("siglip", LARGE_N, 768, "ours-512MB", ms=50.0, mb=640, public="54.3 ms, 640 MB on a GH200"),
    Aim("clip", MILLION, 512),
]

# Milliseconds at N = M = 65,536 for each D by a model of an H100 (arithmetic, memory traffic, exponentials); they grow
# with N · M. Ours takes the best strategy of the kernels for each D. The model has no SigLIP.
_MODEL_DIMS = (128, 256, 512, 768, 1024)
_MODEL_MS = {
    ("clip", "ours"): (10.7, 16.0, 30.1, 44.2, 58.3),
    ("clip", "eager"): (66.6, 68.0, 78.7, 89.4, 100.1),
    ("clip", "autocast"): (154, 156, 166, 177, 188),
    ("clip", "compile"): (29.5, 30.9, 41.6, 52.3, 63.0),
    ("clip", "inf-cl"): (148, 296, 591, 887, 1182),
    ("nt_xent", "ours"): (5.4, 8.4, 15.8, 23.1, 30.5),
    ("nt_xent", "eager"): (56.5, 57.9, 68.6, 79.3, 90.0),
    ("nt_xent", "autocast"): (96.9, 98.3, 109, 120, 130),
    ("nt_xent", "compile"): (19.4, 20.8, 31.5, 42.2, 52.9),
}


def modelled_ms(loss: str, provider: str, n: int, d: int) -> float | None:
    """Return the milliseconds that the model predicts; None outside the model."""
    times = _MODEL_MS.get((loss, provider))
    return times[_MODEL_DIMS.index(d)] * (n / LARGE_N) ** 2 if times and d in _MODEL_DIMS else None


_EXPLANATION = (
    'Forward + backward, bfloat16, medians. "model" and "aim" belong to the measured column on their left: what a',
    "cost model of an H100 predicts, and what an H100 should reach. Memory is beyond inputs and gradients, 1 MB = 10⁶",
    f"bytes. Public kernels ({', '.join(peers.KERNELS)}) have a row where they were installed.",
)


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


def _aims(measured: Measured) -> Rows:
    headers = ["loss", "N", "D", "ms", "model", "aim", "× eager", "model", "aim", "extra MB", "aim", "met", "published"]
    body = []
    for aim in AIMS:
        case = aim.loss, aim.n, aim.d
        ms, mb = measured.ms(*case, aim.provider), _megabytes(measured.row(*case, aim.provider))
        model = modelled_ms(aim.loss, aim.provider, aim.n, aim.d)
        gain = _ratio(measured.ms(*case, "eager"), ms)
        modelled_gain = _ratio(modelled_ms(aim.loss, "eager", aim.n, aim.d), model) if aim.gain else None
        tests = [(ms, aim.ms, -1), (gain, aim.gain, 1), (mb, aim.mb, -1)]
        verdicts = [value is not None and value * sign >= limit * sign for value, limit, sign in tests if limit]
        body.append([
            aim.loss + ("" if aim.provider == "ours" else f" ({aim.provider})"), f"{measured.size(aim.n):,}",
            str(aim.d), measured.cell(*case, aim.provider), _number(model), _at_most(aim.ms), _number(gain, ".1f"),
            _number(modelled_gain, ".1f"), "" if aim.gain is None else f"≥ {aim.gain:g}", _number(mb), _at_most(aim.mb),
            "" if ms is None else "yes" if all(verdicts) else "no", aim.public,
        ])  # fmt: skip
    return headers, body


def _limited(measured: Measured) -> Rows:
    headers = ["loss", "N", "D", "ms", "ms within 128 MB", "slower", "aim", "extra MB"]
    body = []
    for loss in PAIR:
        for d in DIMS:
            free, limited = (measured.ms(loss, LARGE_N, d, provider) for provider in ("ours", "ours-128MB"))
            slower = _ratio(limited, free)
            mb = _megabytes(measured.row(loss, LARGE_N, d, "ours-128MB"))
            body.append([
                loss, f"{measured.size(LARGE_N):,}", str(d), _number(free),
                measured.cell(loss, LARGE_N, d, "ours-128MB"),
                "" if slower is None else f"{slower - 1:.0%}", f"≤ {LIMITED_SLOWDOWN - 1:.0%}", _number(mb),
            ])  # fmt: skip
    return headers, body


def _others(measured: Measured) -> Rows:
    headers = ["loss", "N", "D", "", "ms", "20–80 %", "model", "ours is × as fast", "model", "extra MB", "of matmul"]
    body = []
    cases = [(loss, AIM_N, d, BASELINES) for loss in PAIR for d in DIMS]
    cases += [(loss, LARGE_N, d, ("compile",)) for loss in PAIR for d in DIMS]
    for loss, n, d, baselines in [*cases, ("siglip", LARGE_N, 768, ("compile",)), ("clip", MILLION, 512, ())]:
        ours, modelled_ours = measured.ms(loss, n, d, "ours"), modelled_ms(loss, "ours", n, d)
        expected = [name for name in baselines if name != "linear_cross_entropy" or loss == "clip"]
        for provider in dict.fromkeys(["ours", *expected, *measured.providers(loss, n, d)]):
            row, model = measured.row(loss, n, d, provider), modelled_ms(loss, provider, n, d)
            itself = provider == "ours"
            body.append([
                loss, f"{measured.size(n):,}", str(d), provider, measured.cell(loss, n, d, provider),
                f"{_number(row.ms_20)}–{_number(row.ms_80)}" if row else "", _number(model),
                "" if itself else _number(_ratio(row and row.ms_50, ours), ".1f"),
                "" if itself else _number(_ratio(model, modelled_ours), ".1f"), _number(_megabytes(row)),
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
