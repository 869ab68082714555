"""An exported net for TPU-MLIR, whose front end knows no integers of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from qwen_surgery.exporting.manifest import Manifest
from qwen_surgery.exporting.placement import InlinePlacement
from qwen_surgery.exporting.template import Template, bind
from qwen_surgery.weights import QuantisedRef


def plain_net(file: Path, work: Path) -> Path:
    """The net *file* of an exported folder. Where it holds quantised weights: the same net in *work*, written
    with the values of all its weights inside."""
    manifest = Manifest.load(file.parent)
    entry = manifest.net(file.stem)
    if not any(isinstance(ref, QuantisedRef) for ref in entry.weights.values()):
        return file
    template = Template.load(entry.kind, file.parent / manifest.template_file(entry.kind))
    plain = work / file.name
    plain.write_bytes(bind(template, entry.weights, InlinePlacement()).SerializeToString())
    return plain
