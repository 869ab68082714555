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
from qwen_surgery.packing.cascade import (
    DevicePart,
    WholeNet,
    devices_of,
    is_share,
    name_of,
    nets_of,
    shape_of,
    whole_nets,
)
from qwen_surgery.packing.container import Bmodel, Region, regions
from qwen_surgery.packing.schema import DATA_TYPES
from qwen_surgery.packing.sidefile import Prediction, SideFile
from qwen_surgery.runtime.generations import Suitability, suitability
from qwen_surgery.runtime.memory import BASIC, IO_ALONE

_PER_LAYER = re.compile(r"(block|block_cache)_(\d+)")


@dataclass(frozen=True)
class TensorReport:
    """An input or output as the file declares it, on one of the devices that share its net. ``share``: it is
    a part of the tensor, and the other devices have the rest.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: int = 0
    share: bool = False


@dataclass(frozen=True)
class NetReport:
    """One net: its tensors and the bytes it takes, on the device where they are most. ``shared`` says that
    another net before it holds its weights; ``io_alone``, that its inputs and outputs have addresses of their
    own; ``tagged``, that they have none, but tags that the demos do not know. ``devices`` share it.
    ``whole_inputs`` are the shapes of its inputs as one device would have them.
    """

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
    devices: tuple[int, ...] = (0,)
    whole_inputs: tuple[tuple[int, ...], ...] = ()

    def on(self, device: int) -> tuple[tuple[TensorReport, ...], tuple[TensorReport, ...]]:
        """Its inputs and outputs on one device."""
        here = tuple(tensor for tensor in self.inputs if tensor.device == device)
        return here, tuple(tensor for tensor in self.outputs if tensor.device == device)


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


def _tensors(whole: WholeNet, key: str) -> tuple[TensorReport, ...]:
    return tuple(
        TensorReport(
            name_of(part, tensor),
            shape_of(tensor),
            DATA_TYPES.get(tensor["data_type"], (f"type {tensor['data_type']}", 0))[0],
            part.device,
            is_share(whole, tensor),
        )
        for part, tensor in whole.tensors(key)
    )


@dataclass(frozen=True)
class _Bytes:
    """What one device holds of a net; ``new``: of its weights, those that no net before it brought there."""

    weights: int
    new: int
    instructions: int
    runtime: int

    @classmethod
    def of(cls, parts: tuple[DevicePart, ...], seen: set[Region]) -> _Bytes:
        weights = new = instructions = runtime = 0
        for parameter in (part.parameter for part in parts):
            coefficients = parameter.get("coeff_mem", {}).get("binary_coeff", {"start": 0, "size": 0})
            region = Region.of(coefficients)
            weights += region.size
            new += region.size if region not in seen else 0
            seen.add(region)
            others = {Region.of(b) for b in regions(parameter, "NetParameter") if b is not coefficients}
            instructions += sum(other.size for other in others)
            runtime += parameter["ctx_size"] + parameter["io_size"]
        return cls(weights, new, instructions, runtime)


def _net(whole: WholeNet, seen: dict[int, set[Region]]) -> NetReport:
    """*seen* are the weights of nets before it, by device."""
    held = [_Bytes.of(whole.on(device), seen.setdefault(device, set())) for device in whole.devices]
    weights, first = max(one.weights for one in held), whole.parts[0]
    modes = {part.table["addr_mode"] for part in whole.parts}
    return NetReport(
        name=whole.name,
        inputs=_tensors(whole, "input_tensor"),
        outputs=_tensors(whole, "output_tensor"),
        weight_bytes=weights,
        instruction_bytes=max(one.instructions for one in held),
        runtime_bytes=max(one.runtime for one in held),
        shared=weights > 0 and not any(one.new for one in held),
        dynamic=bool(first.parameter["is_dynamic"]),
        io_alone=modes == {IO_ALONE},
        tagged=not modes <= {BASIC, IO_ALONE},
        devices=whole.devices,
        whole_inputs=tuple(tensor.shape for tensor in whole.whole_tensors("input_tensor")),
    )


def _geometry(found: Mapping[str, NetReport], layers: int, device: int = 0) -> Geometry:
    """The sizes that tensors on *device* speak of. Raises LookupError or ValueError where they do not."""
    states, _, _, keys, _ = found["block_cache_0"].on(device)[0]
    _, seq_length, heads, head_dim = keys.shape
    vocab = found["lm_head"].outputs[0].shape[-1]
    return Geometry(layers, states.shape[-1], heads, head_dim, vocab, 0, seq_length)


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
        devices = found["block_cache_0"].devices
        geometries = tuple(_geometry(found, layers, device) for device in devices)
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
        if kind is NetKind.LM_HEAD_TOPK:
            problems += _compare_head(report, devices[0])
        elif report.devices != devices:
            problems.append(f"{report.name} is on devices {report.devices}, block_cache_0 on {devices}")
        else:
            problems += _compare_devices(report, kind, geometries)
    return problems


def _compare_devices(report: NetReport, kind: NetKind, geometries: tuple[Geometry, ...]) -> list[str]:
    """Demos give every device all inputs: they cannot run a net whose first step is the first one's alone."""
    problems = []
    for device, geometry in zip(report.devices, geometries, strict=True):
        where = f"{report.name} on device {device}" if len(geometries) > 1 else report.name
        given, gives = report.on(device)
        problems += _compare(where, "input", given, inputs(kind, geometry))
        problems += _compare(where, "output", gives, outputs(kind, geometry))
    return problems


def _compare_head(report: NetReport, first: int) -> list[str]:
    """A lm_head that gives a token: the shape of that differs between TPU-MLIR versions, and runtimes read
    one number. Demos for several devices launch it on the *first* one.
    """
    given, gives = report.on(first)
    if len(given) == len(report.inputs) == 1 and len(gives) == len(report.outputs) == 1:
        return []
    found = f"{len(report.inputs)} inputs and {len(report.outputs)} outputs"
    on_it = f"{len(given)} and {len(gives)} of them on the first device"
    return [f"lm_head: {found}, {on_it}; the runtimes launch it there with one of each"]


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
    reports = {whole.name: _net(whole, {}) for whole in nets_of(path)}
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
        seen: dict[int, set[Region]] = {}
        wholes = whole_nets(bmodel.nets)
        reports = tuple(_net(whole, seen) for whole in wholes)
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
        devices=devices_of(wholes),
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
