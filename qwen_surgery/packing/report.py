"""What is inside a bmodel, and whether it keeps the contract with the vendor's runtimes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused
from qwen_surgery.nets import Geometry, NetKind, Tensor, inputs, nets, outputs, sampler_of
from qwen_surgery.packing import sidefile
from qwen_surgery.packing.container import Bmodel, Region, regions
from qwen_surgery.packing.schema import DATA_TYPES
from qwen_surgery.packing.sidefile import Prediction, SideFile
from qwen_surgery.runtime.generations import Suitability, suitability
from qwen_surgery.runtime.memory import BASIC, IO_ALONE

_PER_LAYER = re.compile(r"(block|block_cache)_(\d+)")


@dataclass(frozen=True)
class TensorReport:
    """An input or output as the file declares it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class NetReport:
    """One net: its tensors and the bytes it takes. ``shared`` says that another net before it holds its
    weights; ``io_alone``, that its inputs and outputs have addresses of their own; ``tagged``, that they have
    none, but tags that the demos do not know."""

    name: str
    inputs: tuple[TensorReport, ...]
    outputs: tuple[TensorReport, ...]
    weight_bytes: int
    instruction_bytes: int
    runtime_bytes: int
    shared: bool
    dynamic: bool
    io_alone: bool
    tagged: bool


@dataclass(frozen=True)
class Speed:
    """Predicted milliseconds for the first token (prefill of S positions) and each further one; tokens/s.

    ``uncounted`` are the nets without a prediction of their own.
    """

    first_token_ms: float
    token_ms: float
    tokens_per_second: float
    uncounted: tuple[str, ...]


@dataclass(frozen=True)
class BmodelReport:
    """A bmodel. ``contract`` lists every difference from the contract with the runtimes; empty means kept.
    ``integers`` says by kind of net how its weights are kept, where that is as integers."""

    path: str
    size: int
    chip: str
    version: str
    created: str
    devices: int
    layers: int
    nets: tuple[NetReport, ...]
    contract: tuple[str, ...]
    runtimes: tuple[Suitability, ...]
    speed: Speed | None
    notes: Mapping[str, str]
    refit: str
    integers: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _tensors(declared: list[dict[str, Any]]) -> tuple[TensorReport, ...]:
    return tuple(
        TensorReport(
            tensor["name"],
            tuple(tensor["shape"][0].get("dim", [])) if tensor.get("shape") else (),
            DATA_TYPES.get(tensor["data_type"], (f"type {tensor['data_type']}", 0))[0],
        )
        for tensor in declared
    )


def _net(net: dict[str, Any], seen: set[Region]) -> NetReport:
    parameter = net["parameter"][0]
    coefficients = parameter.get("coeff_mem", {}).get("binary_coeff", {"start": 0, "size": 0})
    weights = Region.of(coefficients)
    others = {Region.of(b) for b in regions(parameter, "NetParameter") if b is not coefficients}
    shared = weights in seen
    seen.add(weights)
    return NetReport(
        name=net["name"],
        inputs=_tensors(parameter["input_tensor"]),
        outputs=_tensors(parameter["output_tensor"]),
        weight_bytes=weights.size,
        instruction_bytes=sum(region.size for region in others),
        runtime_bytes=parameter["ctx_size"] + parameter["io_size"],
        shared=shared and weights.size > 0,
        dynamic=bool(parameter["is_dynamic"]),
        io_alone=net["addr_mode"] == IO_ALONE,
        tagged=net["addr_mode"] not in (BASIC, IO_ALONE),
    )


def _geometry(found: Mapping[str, NetReport], layers: int) -> Geometry:
    """The sizes that the tensors of a bmodel speak of. Raises KeyError or IndexError where they do not."""
    block = found["block_cache_0"]
    _, seq_length, heads, head_dim = block.inputs[3].shape
    hidden = block.inputs[0].shape[-1]
    vocab = found["lm_head"].outputs[0].shape[-1]
    return Geometry(layers, hidden, heads, head_dim, vocab, 0, seq_length)


def _compare(name: str, what: str, found: tuple[TensorReport, ...], wanted: tuple[Tensor, ...]) -> list[str]:
    if len(found) != len(wanted):
        return [f"{name}: {len(found)} {what}s, the runtimes expect {len(wanted)}"]
    problems = []
    for index, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if have.shape != want.shape:
            problems.append(
                f"{name}: {what} {index} has shape {list(have.shape)}, expected {list(want.shape)}"
            )
        whole = have.dtype in ("int32", "uint32")
        if whole != (want.dtype == "int"):
            problems.append(
                f"{name}: {what} {index} is {have.dtype}, expected {'int32' if not whole else 'a float'}"
            )
        if what == "input" and have.name != want.name:
            problems.append(f"{name}: input {index} is called {have.name}, expected {want.name}")
    return problems


def _kind(name: str, multi_device: bool) -> NetKind:
    match = _PER_LAYER.fullmatch(name)
    if match:
        return NetKind(match.group(1))
    return NetKind.LM_HEAD_TOPK if name == "lm_head" and multi_device else NetKind(name)


def _contract(reports: tuple[NetReport, ...], layers: int) -> list[str]:
    """Every way in which *reports* differ from the contract of :mod:`qwen_surgery.nets`."""
    names = [report.name for report in reports]
    found = {report.name: report for report in reports}
    try:
        fused = found["lm_head"].outputs[0].dtype in ("int32", "uint32")
        geometry = _geometry(found, layers)
    except (LookupError, ValueError) as error:
        return [f"not the nets of a model of this contract (missing or odd: {error})"]
    if layers > len(reports):
        return [f"a net of layer {layers - 1}, but {len(reports)} nets in all"]
    sampler = sampler_of(found)
    heads = "greedy_head" in found or sampler.value in found
    wanted = [net.name for net in nets(layers, heads=heads, multi_device=fused, sampler=sampler)]
    if names != wanted:
        first = next(
            (i for i, pair in enumerate(zip(names, wanted, strict=False)) if pair[0] != pair[1]), None
        )
        where = f"net {first} is {names[first]}, expected {wanted[first]}" if first is not None else ""
        return [
            f"{len(names)} nets where the runtimes expect {len(wanted)}" + (f"; {where}" if where else "")
        ]
    problems = []
    for report in reports:
        kind = _kind(report.name, fused)
        if report.tagged:
            problems.append(
                f"{report.name}: its tensors have tags for addresses, which the demos do not know"
            )
        if fused and kind is NetKind.LM_HEAD_TOPK:
            continue  # its token's shape differs between TPU-MLIR versions, and runtimes read one number
        problems += _compare(report.name, "input", report.inputs, inputs(kind, geometry))
        problems += _compare(report.name, "output", report.outputs, outputs(kind, geometry))
    return problems


def speed(predictions: Mapping[str, Prediction], layers: int, heads: bool) -> Speed | None:
    """Predicted speed of *layers* layers, decoding greedily; None without a prediction for the blocks.

    TPU-MLIR states no time for nets that are one memory copy (the embeddings): those are left out and named.
    """
    blocks = ("block", "block_cache", "lm_head")
    if any(kind not in predictions for kind in blocks) or not layers:
        return None
    tail = ("lm_head", "greedy_head") if heads else ("lm_head",)

    def total(kinds: tuple[str, ...]) -> float:
        counted = [(kind, predictions[kind]) for kind in kinds if kind in predictions]
        return sum(p.milliseconds * (layers if k.startswith("block") else 1) for k, p in counted)

    first, each = ("embedding", "block", *tail), ("embedding_cache", "block_cache", *tail)
    missing = dict.fromkeys(kind for kind in first + each if kind not in predictions)
    return Speed(total(first), total(each), 1000 / total(each), tuple(missing))


def _side(path: Path) -> tuple[SideFile | None, str]:
    try:
        side = sidefile.load(path)
    except Refused as error:
        return None, f"no: {error}"
    return side, "yes"


def geometry_of(path: Path) -> Geometry:
    """The sizes that the tensors of the bmodel at *path* speak of. Raises Refused when they speak of none."""
    with Bmodel(path) as bmodel:
        reports = {net["name"]: _net(net, set()) for net in bmodel.nets if net.get("parameter")}
    layers = sum(name.startswith("block_cache_") for name in reports)
    try:
        return _geometry(reports, layers)
    except (KeyError, IndexError, ValueError) as error:
        raise Refused(f"{path} does not hold the nets of a model of this contract") from error


def inspect(path: Path, profile: str | None = None) -> BmodelReport:
    """Read the bmodel at *path* (not its weights). Raises Refused when it is not a whole bmodel.

    It is held against every generation of demos, or those of *profile*: one of them that cannot read the file
    at all breaks the contract only where a profile was named.
    """
    with Bmodel(path) as bmodel:
        seen: set[Region] = set()
        reports = tuple(_net(net, seen) for net in bmodel.nets if net.get("parameter"))
        model, length = bmodel.model, bmodel.length
    layers = 1 + max((int(m.group(2)) for r in reports if (m := _PER_LAYER.fullmatch(r.name))), default=-1)
    side, refit = _side(path)
    contract = tuple(_contract(reports, layers))
    passes = side.notes["passes"].split(", ") if side and "passes" in side.notes else None
    runtimes = () if contract else suitability(path, profile, passes)
    overwritten = tuple(f"{one.generation}: {what}" for one in runtimes for what in one.hazards)
    refused = tuple(f"{one.generation}: {one.refusal}" for one in runtimes if profile and one.refusal)
    return BmodelReport(
        path=str(path),
        size=length,
        chip=model["chip"],
        version=f"{model['type']}.{model['version']}",
        created=model["time"].strip(),
        devices=max(1, model["device_num"]),
        layers=layers,
        nets=reports,
        contract=contract + refused + overwritten,
        runtimes=runtimes,
        speed=speed(side.predictions, layers, any(r.name == "greedy_head" for r in reports))
        if side
        else None,
        notes=side.notes if side else {},
        refit=refit,
        integers=side.integers() if side else {},
    )
