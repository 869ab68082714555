"""The HTML page of a verification: one self-contained file with plots, which opens offline."""

from __future__ import annotations

import difflib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery import __version__, extras, files
from qwen_surgery.errors import Refused
from qwen_surgery.verification.first_screen import first_screen
from qwen_surgery.verification.results import Check, LevelResult, Report
from qwen_surgery.verification.table import COLUMNS, HEADINGS, number, rows_of, worst_of

if TYPE_CHECKING:
    from qwen_surgery.verification.session import Request

_TEMPLATE = Path(__file__).with_name("page.html")
#: Smallest value a logarithmic axis shows; an error of zero is drawn there.
_FLOOR = 1e-17


@dataclass(frozen=True)
class Series:
    """One line of a plot: points (x, y) and, for a test or a reader, what they are."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PassCounts:
    """Ops of one kind of net around one pass."""

    kind: str
    name: str
    before: int
    after: int
    changed: str


@dataclass(frozen=True)
class Predicted:
    """Predicted cost of one net of a kind on the chip."""

    mode: str
    kind: str
    cycles: int
    milliseconds: float


def errors_by_layer(level: LevelResult) -> list[Series]:
    """Per phase, the worst error of each layer's hidden states: max abs in float32, else 1 - cosine."""
    exact = level.mode == "fp32"
    found: dict[str, dict[int, float]] = {}
    for check in level.checks:
        if check.layer is None or check.output != "hidden_states" or not check.values:
            continue
        value = check.values["max_abs"] if exact else 1 - check.values["cosine"]
        if math.isfinite(value):
            layers = found.setdefault(check.phase, {})
            layers[check.layer] = max(layers.get(check.layer, 0.0), value)
    return [
        Series(phase, tuple((float(i), max(v, _FLOOR)) for i, v in sorted(layers.items())))
        for phase, layers in found.items()
    ]


def cosines_by_layer(report: Report) -> list[Series]:
    """Per level and phase, 1 - cosine of each layer's hidden states, the worst of all runs."""
    result = []
    for level in report.levels:
        found: dict[str, dict[int, float]] = {}
        for check in level.checks:
            if check.layer is None or check.output != "hidden_states" or "cosine" not in check.values:
                continue
            value = 1 - check.values["cosine"]
            if math.isfinite(value):
                layers = found.setdefault(check.phase, {})
                layers[check.layer] = max(layers.get(check.layer, 0.0), value)
        for phase, layers in found.items():
            points = tuple((float(i), max(v, _FLOOR)) for i, v in sorted(layers.items()))
            result.append(Series(f"{level.level} {level.mode} {level.name}, {phase}", points))
    return result


def errors_by_net(report: Report) -> tuple[list[str], list[Series]]:
    """Kinds of net, and per level 1 - cosine of each (x counts kinds), worst over layers and phases."""
    kinds: list[str] = []
    result = []
    for level in report.levels:
        worst: dict[str, float] = {}
        for check in level.checks:
            cosine = check.values.get("cosine")
            if cosine is not None and math.isfinite(cosine) and check.kind != "greedy_head":
                worst[check.kind] = max(worst.get(check.kind, 0.0), 1 - cosine)
        kinds += [kind for kind in worst if kind not in kinds]
        points = tuple((float(kinds.index(kind)), max(v, _FLOOR)) for kind, v in worst.items())
        result.append(Series(f"{level.level} {level.mode} {level.name}", points))
    return kinds, result


def write_page(report: Report, path: Path, request: Request) -> None:
    """Write the page of *report* to *path*, whole or not at all.

    Raises ToolFailed when matplotlib or jinja2 is not installed (the ``report`` extra has both).
    """
    extras.need("the HTML page", "report")
    files.write_whole(
        path, render(report, diffs(report), pass_counts(request), predictions(request)).encode()
    )


def render(report: Report, diff: str, passes: list[PassCounts], predicted: list[Predicted]) -> str:
    """The page's text."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    kinds, by_net = errors_by_net(report)
    by_layer = cosines_by_layer(report)
    plots = [
        {
            "title": f"{level.level} {level.mode} {level.name}",
            "svg": plot(f"level{i}", series, "max abs error" if level.mode == "fp32" else "1 - cosine"),
            "series": series,
        }
        for i, level in enumerate(report.levels)
        if (series := errors_by_layer(level))
    ]
    return template.render(
        version=__version__,
        report=report,
        first=first_screen(report),
        together=plot("together", by_layer, "1 - cosine", pairs=True) if by_layer else "",
        plots=plots,
        overview=plot("overview", by_net, "1 - cosine", kinds) if kinds else "",
        levels=[{"level": level, "rows": _rows(level)} for level in report.levels],
        columns=[HEADINGS.get(name, name) for name in COLUMNS],
        diff=diff,
        passes=passes,
        predicted=predicted,
        megabytes=report.peak_rss / 2**20,
    )


def _rows(level: LevelResult) -> list[dict[str, Any]]:
    return [
        {
            "net": net,
            "phase": phase,
            "count": len(checks),
            "numbers": [number(name, worst_of(checks).get(name)) for name in COLUMNS],
            "missed": _sentences(checks),
        }
        for (net, phase), checks in rows_of(level).items()
    ]


def _sentences(checks: list[Check]) -> list[str]:
    return [f"{c.net} {c.label} {c.output}: {'; '.join(c.missed)}" for c in checks if not c.passed]


def plot(
    name: str, series: list[Series], y_label: str, ticks: list[str] | None = None, *, pairs: bool = False
) -> str:
    """An SVG with a logarithmic error axis; lines have the ids ``NAME-line-i``, points ``NAME-point-i-j``.

    Without *ticks* the x axis counts layers; with them it names what stands at 0, 1, ... With *pairs* the
    lines of one level share a colour and a legend entry, and decode is dashed. Text and axes have the page's
    own colour.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    with matplotlib.rc_context(_style(name)):
        figure = Figure(figsize=(7, 3.2) if pairs or ticks else (5, 2.6), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        firsts = {one.name.rpartition(", ")[0]: one for one in reversed(series)}
        levels = list(reversed(firsts))
        for i, one in enumerate(series):
            x = [point[0] for point in one.points]
            y = [point[1] for point in one.points]
            look: dict[str, Any] = {"label": one.name}
            if pairs:
                level, _, phase = one.name.rpartition(", ")
                shown = {"color": f"C{levels.index(level)}", "linestyle": "--" if phase == "decode" else "-"}
                # A name that begins with "_" has no entry in the legend.
                look = {"label": level if one is firsts[level] else f"_{one.name}", **shown}
            if ticks:
                # Side by side, so that equal errors do not hide each other.
                x = [place + 0.12 * (i - (len(series) - 1) / 2) for place in x]
                look["linestyle"] = "none"
            (line,) = axes.plot(x, y, marker="o", markersize=3, **look)
            line.set_gid(f"{name}-line-{i}")
            for j, (px, py) in enumerate(zip(x, y, strict=True)):
                axes.plot(
                    [px], [py], marker="o", markersize=5, color=line.get_color(), gid=f"{name}-point-{i}-{j}"
                )
        axes.set_yscale("log")
        axes.set_ylim(*_decades(series))
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.minorticks_off()
        axes.set_ylabel(y_label)
        axes.grid(True, alpha=0.2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks, rotation=20, ha="right")
        else:
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if series:
            figure.legend(loc="outside upper center", ncols=3, fontsize=7.5, frameon=False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": "matplotlib"})
    text = buffer.getvalue().replace(_INK, "currentColor")
    return text[text.index("<svg") :]  # no XML prologue inside HTML


#: Stands for the page's text colour until the SVG is made; nothing else has it.
_INK = "#010203"


def _style(name: str) -> Any:
    """matplotlib's settings for one plot."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": f"qwen-surgery {name}",  # ids inside must not meet those of another SVG on the page
        "font.size": 9,
        **dict.fromkeys(inked, _INK),
    }


def _decades(series: list[Series]) -> tuple[float, float]:
    """Whole powers of ten around every value."""
    values = [y for one in series for _, y in one.points] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low * 0.5, 10.0 ** max(high, low + 1) * 2


def diffs(report: Report) -> str:
    """The patch that was verified, as a unified diff of every file that changed."""
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.patching.sources import Sources

    sources = Sources.of(Checkout.open(report.checkout), recipe=report.recipe, seq_length=report.seq_length)
    lines: list[str] = []
    for name in sorted(sources.patched):
        before, after = (
            files.get(name, b"").decode("utf-8", "replace").splitlines()
            for files in (sources.reference, sources.patched)
        )
        lines += difflib.unified_diff(before, after, f"a/{name}", f"b/{name}", lineterm="")
    return "\n".join(lines)


def pass_counts(request: Request) -> list[PassCounts]:
    """Op counts around each pass that the cleaned export went through, from its raw neighbour's templates.

    Empty when only one of the two was given: the counts before are those of the raw graphs.
    """
    from qwen_surgery.exporting.manifest import Manifest

    manifests = {folder: Manifest.load(folder) for folder in request.onnx}
    raw = next((folder for folder, manifest in manifests.items() if not manifest.passes), None)
    cleaned = next((manifest for manifest in manifests.values() if manifest.passes), None)
    if raw is None or cleaned is None:
        return []
    from graph_passes.framework import registry
    from qwen_surgery.exporting.cleaning import clean_template
    from qwen_surgery.exporting.template import Template

    known = {one.name for one in registry.onnx_passes()}
    names = [name for name in cleaned.passes if name in known]
    result = []
    for kind in dict.fromkeys(net.kind for net in manifests[raw].nets):
        template = Template.load(kind, raw / manifests[raw].template_file(kind))
        _, kind_report = clean_template(template, names, check="off")
        for one in kind_report.passes:
            if one.changed:
                changed = ", ".join(f"{op} {a} to {b}" for op, (a, b) in sorted(one.ops.items()))
                result.append(PassCounts(kind.value, one.name, one.nodes_before, one.nodes_after, changed))
        totals = (sum(kind_report.before.values()), sum(kind_report.after.values()))
        result.append(PassCounts(kind.value, "all passes", *totals, ""))
    return result


def predictions(request: Request) -> list[Predicted]:
    """What TPU-MLIR predicted when the bmodels were built, where their side files say so."""
    from qwen_surgery.packing import sidefile

    result = []
    for bmodel in request.bmodels:
        try:
            side = sidefile.load(bmodel)
        except Refused:
            continue
        result += [
            Predicted(side.notes.get("mode", bmodel.stem), kind, p.cycles, p.milliseconds)
            for kind, p in side.predictions.items()
        ]
    return result
