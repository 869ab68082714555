"""Runs passes over the Top-dialect text of a net.

TPU-MLIR's ``model_transform`` writes ``<name>.mlir``, ``model_deploy --mlir <name>.mlir`` compiles it. A
compile stage calls :func:`apply` between the two and hands ``model_deploy`` the new text; the weight file
beside it stays as it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from graph_passes.framework import registry
from graph_passes.framework.base import MlirPass, PassError, PassReport
from graph_passes.mlir.text import Module, NotTopText


def apply(text: str, passes: Iterable[MlirPass | str] | None = None) -> tuple[str, tuple[PassReport, ...]]:
    """Run passes over the text of ``<name>.mlir`` and give the new text with a report per pass.

    *passes* are pass objects, names (names of ONNX passes are passed over, so one list serves both kinds), or
    None for every known pass. The text comes back unchanged, character for character, when nothing applies.
    Raises :class:`~graph_passes.mlir.text.NotTopText` when the text is not a Top-dialect module, PassError
    when a pass fails, UnknownPass for a name that no pass has.
    """
    chosen = _resolve(passes)
    module = Module.parse(text)
    reports = []
    for one in chosen:
        started = time.perf_counter()
        before = Counter(op.name for op in module.ops)
        try:
            sites = one.rewrite(module)
        except NotTopText:
            raise
        except Exception as error:
            raise PassError(one.name, f"failed: {type(error).__name__}: {error}") from error
        if sites:
            module = Module.parse(module.text())
        after = Counter(op.name for op in module.ops)
        changed = {k: (before[k], after[k]) for k in sorted(before | after) if before[k] != after[k]}
        reports.append(
            PassReport(
                one.name,
                tuple(sites),
                sum(before.values()),
                sum(after.values()),
                changed,
                int(bool(sites)),
                time.perf_counter() - started,
            )
        )
    return (module.text() if any(r.changed for r in reports) else text), tuple(reports)


def _resolve(passes: Iterable[MlirPass | str] | None) -> tuple[MlirPass, ...]:
    if passes is None:
        return registry.mlir_passes()
    given = list(passes)
    names = [p for p in given if isinstance(p, str)]
    if names:
        registry.require_known(names)
        return registry.select(registry.mlir_passes(), names)
    return tuple(p for p in given if isinstance(p, MlirPass))
