"""Read and write the flatbuffer of a bmodel as plain dicts, driven by :mod:`.schema`.

Reading trusts nothing: every offset is checked against the buffer, so a truncated or corrupted file ends in
:class:`Damaged` and never in a wrong value. Writing puts fields, strings and tables in the order in which
TPU-MLIR's own tool packs them, so that an unchanged model is written with unchanged bytes.
"""

from __future__ import annotations

import struct
from typing import Any

from qwen_surgery.packing.schema import SCALARS, STRUCTS, TABLES, Field

Dict = dict[str, Any]
#: Values in one bmodel. A net has about 500; as Python values these take 500 MB.
MOST_VALUES = 5_000_000


class Damaged(ValueError):
    """The buffer is not a flatbuffer of the expected schema."""


def _struct_size(name: str) -> int:
    return sum(SCALARS[type_][1] for _, type_ in STRUCTS[name])


def element_size(type_: str) -> int:
    """Bytes that one value of *type_* takes inline: in a table, or in a vector."""
    if type_ in SCALARS:
        return SCALARS[type_][1]
    return _struct_size(type_) if type_ in STRUCTS else 4


class _Buffer:
    """Reads values out of *data*, at most :data:`MOST_VALUES`: offsets may lead to one table many times."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._left = MOST_VALUES

    def _spend(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise Damaged(f"it describes more than {MOST_VALUES:,} values")

    def unpack(self, fmt: str, position: int) -> Any:
        if position < 0:
            raise Damaged(f"offset {position} lies outside the buffer")
        try:
            return struct.unpack_from("<" + fmt, self._data, position)[0]
        except struct.error as error:
            raise Damaged(f"offset {position} lies outside the buffer of {len(self._data)} bytes") from error

    def _inline(self, type_: str, position: int) -> Any:
        """The value of *type_* whose inline part is at *position*."""
        if type_ in SCALARS:
            return self.unpack(SCALARS[type_][0], position)
        if type_ in STRUCTS:
            return self._struct(type_, position)
        target = position + self.unpack("I", position)
        if type_ == "string":
            return self._string(target)
        if type_.startswith("["):
            return self._vector(type_[1:-1], target)
        return self.table(type_, target)

    def _struct(self, name: str, position: int) -> Dict:
        self._spend(len(STRUCTS[name]))
        values, at = {}, position
        for member, type_ in STRUCTS[name]:
            values[member] = self.unpack(SCALARS[type_][0], at)
            at += SCALARS[type_][1]
        return values

    def _string(self, position: int) -> str:
        length = self.unpack("I", position)
        text = self._data[position + 4 : position + 4 + length]
        if len(text) != length:
            raise Damaged("a string runs past the end of the buffer")
        self._spend(1 + length // 8)
        return text.decode("utf-8", "surrogateescape")

    def _vector(self, type_: str, position: int) -> list[Any]:
        length = self.unpack("I", position)
        size = element_size(type_)
        if position + 4 + length * size > len(self._data):
            raise Damaged("a vector runs past the end of the buffer")
        self._spend(1 + length)
        if type_ == "uint8":
            return list(self._data[position + 4 : position + 4 + length])
        return [self._inline(type_, position + 4 + i * size) for i in range(length)]

    def table(self, name: str, position: int) -> Dict:
        self._spend(1 + len(TABLES[name]))
        vtable = position - self.unpack("i", position)
        size = self.unpack("H", vtable)
        if size < 4 or size % 2:
            raise Damaged(f"the field list of a {name} is damaged")
        known = TABLES[name]
        count = (size - 4) // 2
        for index in range(len(known), count):
            if self.unpack("H", vtable + 4 + 2 * index):
                raise Damaged(f"a {name} holds field {index}, which this program does not know")
        result: Dict = {}
        for index, field in enumerate(known):
            offset = self.unpack("H", vtable + 4 + 2 * index) if index < count else 0
            if offset:
                result[field.name] = self._inline(field.type, position + offset)
            elif field.required:
                raise Damaged(f"a {name} lacks its {field.name}")
            elif field.type in SCALARS:
                result[field.name] = field.default
        return result


def read(data: bytes) -> Dict:
    """The root ``Model`` of the flatbuffer *data*: tables and structs as dicts, vectors as lists.

    Scalars that are absent get their default; absent strings, vectors, structs and tables are left out.
    Raises :class:`Damaged`.
    """
    reader = _Buffer(data)
    try:
        return reader.table("Model", reader.unpack("I", 0))
    except RecursionError as error:  # offsets that lead back to themselves
        raise Damaged("the tables of the buffer form a circle") from error


def _width(field: Field) -> int:
    return SCALARS[field.type][1] if field.type in SCALARS else 4


class _Packer:
    """Writes tables in the order of the C++ object API: children in field order, then the table."""

    def __init__(self) -> None:
        import flatbuffers

        self.builder = flatbuffers.Builder(1 << 16)

    def string(self, text: str) -> int:
        return int(self.builder.CreateString(text.encode("utf-8", "surrogateescape")))

    def _put_struct(self, name: str, value: Dict) -> None:
        size = _struct_size(name)
        self.builder.Prep(max(SCALARS[type_][1] for _, type_ in STRUCTS[name]), size)
        for member, type_ in reversed(STRUCTS[name]):
            self._put_scalar(type_, value[member])

    def _put_scalar(self, type_: str, value: Any) -> None:
        getattr(self.builder, "Prepend" + type_.capitalize())(value)

    def vector(self, type_: str, values: list[Any]) -> int:
        if type_ in TABLES:
            return self.offsets([self.table(type_, value) for value in values])
        members = [member for _, member in STRUCTS[type_]] if type_ in STRUCTS else [type_]
        self.builder.StartVector(element_size(type_), len(values), max(SCALARS[m][1] for m in members))
        for value in reversed(values):
            if type_ in STRUCTS:
                self._put_struct(type_, value)
            else:
                self._put_scalar(type_, value)
        return int(self.builder.EndVector())

    def offsets(self, targets: list[int]) -> int:
        """A vector of offsets to *targets*, things already written."""
        self.builder.StartVector(4, len(targets), 4)
        for target in reversed(targets):
            self.builder.PrependUOffsetTRelative(target)
        return int(self.builder.EndVector())

    def _child(self, field: Field, value: Any) -> int | None:
        """Write what *field* points to; None when there is nothing to write (or it lies inline)."""
        if field.type in SCALARS or field.type in STRUCTS:
            return None
        if field.type == "string":
            return self.string(value) if value or field.required else None
        if field.type.startswith("["):
            return self.vector(field.type[1:-1], value) if value or field.required else None
        return self.table(field.type, value)

    def table(self, name: str, value: Dict) -> int:
        fields = TABLES[name]
        children = [self._child(f, value[f.name]) if f.name in value else None for f in fields]
        return self.table_of(name, value, children)

    def table_of(self, name: str, value: Dict, children: list[int | None], order: str = "") -> int:
        """Write the table itself: the fields in *order*; by default wide fields first, and within one width
        the last id first, as generated code does."""
        fields = TABLES[name]
        slots = sorted(range(len(fields)), key=lambda i: (-_width(fields[i]), -i))
        if order:
            names = [field.name for field in fields]
            slots = [names.index(word) for word in order.split()]
        self.builder.StartObject(len(fields))
        for slot in slots:
            self._put_field(slot, fields[slot], value.get(fields[slot].name), children[slot])
        return int(self.builder.EndObject())

    def _put_field(self, slot: int, field: Field, value: Any, child: int | None) -> None:
        if child is not None:
            self.builder.PrependUOffsetTRelativeSlot(slot, child, 0)
        elif field.type in SCALARS:
            if value is not None and value != field.default:
                self._put_scalar(field.type, value)
                self.builder.Slot(slot)
        elif field.type in STRUCTS and value is not None:
            self._put_struct(field.type, value)
            self.builder.Slot(slot)


# The three outermost tables are written by hand in TPU-MLIR, each in its own order of fields.
_NET_ORDER = "name cascade parameter addr_mode"
_MODULES = (
    ("kernel_module", "KernelModule", "file_name binary mode"),
    ("cpuop_module", "CpuopModule", "file_name binary"),
)
_MODEL_ORDER = (
    "chip type time version net neuron_size kernel_module device_num cpuop_module bmodel_type lib_backend"
)


def write(model: Dict) -> bytes:
    """The flatbuffer of *model* (a dict as :func:`read` gives it), byte for byte as ``model_tool`` packs it.

    The order of the outer parts is that of the tool's combine: first every net's parameters, then the nets
    themselves, then the model's strings.
    """
    packer = _Packer()
    parameters = [[packer.table("NetParameter", p) for p in net.get("parameter", [])] for net in model["net"]]
    nets = [_write_net(packer, net, p) for net, p in zip(model["net"], parameters, strict=True)]
    packer.builder.Finish(_write_model(packer, model, nets))
    return bytes(packer.builder.Output())


def _write_net(packer: _Packer, net: Dict, parameters: list[int]) -> int:
    children: dict[str, int | None] = dict.fromkeys(field.name for field in TABLES["Net"])
    children["parameter"] = packer.offsets(parameters)
    if "cascade" in net:
        cascade = net["cascade"]
        main = packer.string(cascade.get("main_name", ""))
        children["cascade"] = packer.table_of(
            "Cascade", cascade, [None, None, main], "device_id step main_name"
        )
    children["name"] = packer.string(net["name"])
    return packer.table_of("Net", net, list(children.values()), _NET_ORDER)


def _write_model(packer: _Packer, model: Dict, nets: list[int]) -> int:
    children: dict[str, int | None] = dict.fromkeys(field.name for field in TABLES["Model"])
    children["type"] = packer.string(model["type"])
    children["version"] = packer.string(model["version"])
    children["net"] = packer.offsets(nets)
    children["chip"] = packer.string(model["chip"])
    children["time"] = packer.string(model["time"])
    # The tool writes one file name, the kernel module's, and points both modules to it.
    name: int | None = None
    for key, table, order in _MODULES:
        if key in model:
            name = packer.string(model[key]["file_name"]) if name is None else name
            rest: list[int | None] = [None] * (len(TABLES[table]) - 1)
            children[key] = packer.table_of(table, model[key], [name, *rest], order)
    return packer.table_of("Model", model, list(children.values()), _MODEL_ORDER)
