"""Clean an exported folder: passes over its templates, nets bound again, a manifest that names the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_surgery.errors import Refused, ToolFailed, Usage
from qwen_surgery.nets import NetKind

if TYPE_CHECKING:
    from graph_passes import PassReport
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.exporting.template import Template


#: Passes that run where TPU-MLIR splits nets over several devices, and nowhere else.
SPLITTING = ("split-attention",)


@dataclass(frozen=True)
class KindReport:
    """What cleaning did to one kind of net: ops by type before and after, the passes' reports in order."""

    kind: NetKind
    before: dict[str, int]
    after: dict[str, int]
    passes: tuple[PassReport, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind.value,
            "nodes": [sum(self.before.values()), sum(self.after.values())],
            "ops_before": self.before,
            "ops_after": self.after,
            "passes": [report.to_json() for report in self.passes],
        }


@dataclass(frozen=True)
class Cleaning:
    """A cleaned export: its manifest and a report per kind of net, in the manifest's order."""

    manifest: Manifest
    kinds: tuple[KindReport, ...]


def chosen_passes(
    recipe: str | Path | None = None,
    skip: Iterable[str] = (),
    toolchain: str | None = None,
    also: Iterable[str] = (),
    *,
    several: bool = False,
) -> tuple[str, ...]:
    """Names of the passes that run, ONNX and Top dialect, in running order.

    *recipe* is a TOML file (see :mod:`graph_passes.framework.recipe`), *skip* switches more of them off, and
    *toolchain* (a TPU-MLIR version such as "1.6") those that version cannot take; *also* are passes that only
    run where something needs them. For *several* devices those run that let TPU-MLIR split the nets. Raises
    Usage for a bad recipe or an unknown name.
    """
    from graph_passes.framework import recipe as recipes
    from graph_passes.framework import registry

    skip = tuple(skip)
    also = (*also, *(SPLITTING if several else ()))
    try:
        names = recipes.read(recipe) if recipe is not None else recipes.without((), also)
        registry.require_known(skip)
    except registry.UnknownPass as error:
        raise Usage(str(error), hint=f"passes are {', '.join(error.known)}") from error
    except ValueError as error:  # a bad recipe, or two passes of one name
        raise Usage(str(error)) from error
    off = set(skip) | (registry.unfit(toolchain) if toolchain else set())
    off |= registry.undivided() if several else set()
    if several and toolchain and off & set(SPLITTING) - set(skip):
        raise Usage(f"TPU-MLIR {toolchain} is not known to split nets over several devices")
    return tuple(name for name in names if name not in off)


def clean_export(
    source: str | Path,
    out: str | Path | None = None,
    *,
    passes: Iterable[str] | None = None,
    check: str = "each",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Cleaning:
    """Clean every template of the export *source* into *out* (None: in its own place).

    *passes* are names as :func:`chosen_passes` gives them; None means all. *check* is "each" (outputs
    compared after every pass), "end" (once, whole, bisecting to the pass at fault) or "off". The folder
    appears whole or not at all. Raises Refused when *source* is no export or does not match its manifest, or
    when a cleaned net holds a form that TPU-MLIR refuses or miscompiles; ToolFailed when a pass breaks a net.
    """
    from qwen_surgery.exporting.manifest import Manifest
    from qwen_surgery.exporting.template import Template
    from qwen_surgery.exporting.writing import rebind

    source = Path(source)
    manifest = Manifest.load(source)
    manifest.check(source)
    names = tuple(passes) if passes is not None else chosen_passes()
    kinds = tuple(dict.fromkeys(net.kind for net in manifest.nets))
    templates: dict[NetKind, Template] = {}
    reports = []
    progress("clean", 0, len(kinds))
    for done, kind in enumerate(kinds):
        template = Template.load(kind, source / manifest.template_file(kind))
        model, report = clean_template(template, names, check)
        templates[kind] = Template(kind, model)
        reports.append(report)
        progress("clean", done + 1, len(kinds))
    new = rebind(source, templates, Path(out) if out else source, _record(manifest.passes, names), progress)
    return Cleaning(new, tuple(reports))


def clean_template(template: Template, passes: Iterable[str], check: str = "each") -> tuple[Any, KindReport]:
    """One template cleaned and preflighted: its model and report. Raises as :func:`clean_export` does."""
    from graph_passes import PassError, clean
    from graph_passes.framework.runner import count_ops

    try:
        result = clean(template.model, passes, check=check)
    except PassError as error:
        raise ToolFailed(
            f"{template.kind.value}: {error}", hint=f"leave it out with --skip {error.pass_name}"
        ) from error
    refuse_unfit(result.model, template.kind.value)
    before, after = count_ops(template.model), count_ops(result.model)
    return result.model, KindReport(template.kind, dict(before), dict(after), result.reports)


def refuse_unfit(model: Any, net: str) -> None:
    """Raise Refused, naming node and remedy, for a form that TPU-MLIR refuses or miscompiles."""
    from graph_passes import lint

    findings = lint.check(model)
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise Refused(f"{net}: {findings[0]}{more}", hint=findings[0].remedy)


def _record(earlier: tuple[str, ...], now: tuple[str, ...]) -> tuple[str, ...]:
    """What the manifest says ran: ONNX passes of an earlier cleaning are in the graphs for good."""
    from graph_passes.framework import registry

    in_graph = {p.name for p in registry.onnx_passes()}
    return tuple(dict.fromkeys([*(n for n in earlier if n in in_graph), *now]))
