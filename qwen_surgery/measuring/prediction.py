"""What TPU-MLIR predicts for a net on the chip: compile a template with random weights, read the profile.

Cycles depend on shapes and quantisation, not on the weights' values, so a template is enough; but the values
must look like weights (an all-equal gamma, say, would be folded away and flatter the net).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codemods.config.facts import CONFIG, SIZES
from qwen_surgery.nets import Net, NetKind

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from golden.cycles import LayerSizes
    from qwen_surgery.compiling.options import CompileOptions
    from qwen_surgery.exporting.template import Template
    from qwen_surgery.families.family import Family
    from qwen_surgery.toolchain import Toolchain


@dataclass(frozen=True)
class NetPrediction:
    """One net as compiled: cycles and milliseconds on the chip, nodes of the ONNX graph, operations in the
    Top dialect (inputs, weights and constants not counted), bytes of the bmodel."""

    cycles: int
    milliseconds: float
    nodes: int
    top_ops: int
    bmodel_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def random_weights(template: Template, seed: int = 0) -> dict[str, np.ndarray]:
    """slot -> float32 values of the size a trained layer has: gammas around 1, biases 0.1, matrices 0.02."""
    import numpy as np

    rng = np.random.default_rng(seed)
    result = {}
    for slot, shape in template.slots.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) > 1:
            values *= np.float32(0.02)
        elif "ln_" in slot or "norm" in slot:
            values = 1 + np.float32(0.2) * values
        else:
            values *= np.float32(0.1)
        result[slot] = values
    return result


def with_weights(template: Template, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The template with *weights* (slot -> float32 array) as plain initializers."""
    import onnx
    from onnx import numpy_helper

    from qwen_surgery.exporting.template import WEIGHT_PREFIX

    model = onnx.ModelProto()
    model.CopyFrom(template.model)
    kept = [value for value in model.graph.input if not value.name.startswith(WEIGHT_PREFIX)]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for slot, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values, WEIGHT_PREFIX + slot))
    return model


def templates_of(
    sizes: LayerSizes, seq_length: int, kinds: Iterable[NetKind], folder: Path
) -> dict[NetKind, Template]:
    """Templates of one layer of *sizes* at an export length; the checkout goes to *folder*.

    The layer's code is the installed one of its family, or the newest era's own-written code.
    """
    from qwen_surgery import families
    from qwen_surgery.checkout import Checkout
    from qwen_surgery.exporting.export import trace_templates
    from qwen_surgery.patching.sources import Sources

    family = families.of({"model_type": sizes.model_type})
    if family.home:
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(config_of(sizes, seq_length, family)))
    else:
        _make_era(sizes, seq_length, folder)
    checkout = Checkout.open(folder)
    geometry = checkout.geometry(seq_length)
    sources = Sources.of(checkout, recipe="static", seq_length=seq_length)
    return trace_templates(sources, geometry, kinds)


def config_of(sizes: LayerSizes, seq_length: int, family: Family) -> dict[str, Any]:
    """config.json of one layer of *sizes* of a family whose code is installed."""
    names = {**SIZES, **family.widths}
    known = {name: getattr(sizes, name) for name in names if getattr(sizes, name, 0)}
    return {
        "model_type": sizes.model_type,
        **{names[name][0]: value for name, value in {"layers": 1, **known}.items()},
        family.trained: seq_length,
    }


def _make_era(sizes: LayerSizes, seq_length: int, folder: Path) -> None:
    from golden.eras import make_checkout

    make_checkout(
        folder,
        layers=1,
        hidden=sizes.hidden,
        heads=sizes.heads,
        intermediate=sizes.intermediate,
        vocab=sizes.vocab,
        trained_length=max(seq_length, 2048),
        sparse=True,
    )


def compile_template(
    template: Template,
    passes: Iterable[str] | None,
    options: CompileOptions,
    toolchain: Toolchain,
    work: Path,
    *,
    check: str = "off",
    seed: int = 0,
) -> tuple[Path, NetPrediction]:
    """Clean (None: leave as exported), bind random weights, compile in *work*: the bmodel and its cost.

    *options* must be resolved. Without cleaning TPU-MLIR runs its own simplification, as in the documented
    flow. Raises ToolFailed when a tool fails.
    """
    import onnx

    from graph_passes import clean, mlir
    from graph_passes.mlir.text import Module
    from qwen_surgery.compiling.one import NetJob, deploy, transform
    from qwen_surgery.compiling.profile import profile_of, read_profile
    from qwen_surgery.errors import ToolFailed
    from qwen_surgery.exporting.template import Template as Exported

    names = None if passes is None else tuple(passes)
    work.mkdir(parents=True, exist_ok=True)
    cleaned = (
        template
        if names is None
        else Exported(template.kind, clean(template.model, names, check=check).model)
    )
    name = template.kind.value
    onnx.save(with_weights(cleaned, random_weights(template, seed)), str(work / f"{name}.onnx"))
    job = NetJob(Net(name, template.kind), work / f"{name}.onnx", cleaned=names is not None)
    transform(job, toolchain, work, work)
    text = (work / job.mlir).read_text(encoding="utf-8")
    if names is not None:
        text, _ = mlir.apply(text, names)
        (work / job.mlir).write_text(text, encoding="utf-8")
    bmodel, _ = deploy(job, options, 1, toolchain, work, work)
    profile = read_profile(profile_of(bmodel))
    if profile is None:
        raise ToolFailed(f"{name}: model_deploy predicted nothing for this net")
    ops = [op for op in Module.parse(text).ops if op.name not in ("top.Input", "top.Weight", "top.None")]
    return bmodel, NetPrediction(
        profile.cycles, profile.milliseconds, len(cleaned.model.graph.node), len(ops), bmodel.stat().st_size
    )
