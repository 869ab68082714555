"""The tables of a bmodel's flatbuffer, as data.

Source of facts: the schema text that ``model_tool`` of TPU-MLIR carries and prints by (``bmodel.fbs``, file
format 2.2). Fields stand in the order of their ids, which is also the order in which ``model_tool`` walks and
packs them.

A type is a scalar's name, ``string``, the name of a struct or table, or a vector: one of these in brackets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: scalar name -> (format letter of :mod:`struct`, size in bytes)
SCALARS: dict[str, tuple[str, int]] = {
    "uint8": ("B", 1),
    "int32": ("i", 4),
    "uint32": ("I", 4),
    "float32": ("f", 4),
    "uint64": ("Q", 8),
}

#: struct name -> its members, in memory order (all members of one struct have one size, so there is no
#: padding)
STRUCTS: dict[str, tuple[tuple[str, str], ...]] = {
    "Binary": (("start", "uint64"), ("size", "uint64")),
    "RelEntry": (("base_addr_id", "uint32"), ("addr_offset", "uint32"), ("cmd_offset", "uint32")),
}


@dataclass(frozen=True)
class Field:
    """One field of a table. ``required`` vectors and strings are written even when empty."""

    name: str
    type: str
    default: Any = 0
    required: bool = False


def _table(text: str) -> tuple[Field, ...]:
    fields = []
    for word in text.split():
        name, _, type_ = word.partition(":")
        required = type_.endswith("!")
        type_, _, default = type_.rstrip("!").partition("=")
        value = float(default) if type_ == "float32" and default else int(default or 0)
        fields.append(Field(name, type_, value, required))
    return tuple(fields)


#: table name -> fields by id. ``!`` marks a required field, ``=`` a default other than zero.
TABLES: dict[str, tuple[Field, ...]] = {
    "Shape": _table("dim:[uint64]"),
    "CmdGroup": _table(
        "bdc_num:uint32 gdma_num:uint32 binary_bdc:Binary binary_gdma:Binary bdc_cmd_byte:uint32 "
        "gdma_cmd_byte:uint32 reloc_entries:[RelEntry]"
    ),
    "CoreCommands": _table(
        "gdma_tiu_commands:[CmdGroup] sdma_commands:[Binary] hau_commands:[Binary] cdma_commands:[Binary]"
    ),
    "StageIR": _table(
        "ir_info_len:uint32 height_high:int32 height_low:int32 width_high:int32 width_low:int32"
    ),
    "Location": _table("name:string! offset:uint64 size:uint64"),
    "CoeffMem": _table(
        "address:uint64 check_code:[uint8] binary_coeff:Binary location:[Location] encrypt_mode:int32 "
        "decrypt_size:uint64"
    ),
    "Tensor": _table(
        "name:string! data_type:uint32 gmem_stmode:int32 device_addr:uint64 size:uint64 shape:[Shape] "
        "mem_type:uint32 scale:float32=1.0 cpu_addr:uint32 pad_h:uint32 zero_point:int32 hidden:int32 "
        "index:int32 relentry:RelEntry"
    ),
    "CpuConst": _table("name:string const_data:Binary check_code:[uint8]"),
    "CpuParam": _table("op_type:int32 binary_param:Binary cpu_const:[CpuConst] is_custom:int32"),
    "OutputFrom": _table("indice:[int32]"),
    "MergeParam": _table("output_from:[OutputFrom]"),
    "SwitchParam": _table("output_from:[int32] output_branch:[int32]"),
    "SubNet": _table(
        "subnet_mode:int32 cmd_group:[CmdGroup] cpu_param:[CpuParam] input_tensor:[Tensor] "
        "output_tensor:[Tensor] is_dynamic:int32 ir_offset:uint32 ir_len:uint32 n_dynamic:int32 "
        "h_w_dynamic:int32 id:int32=-1 next_subnet_ids:[int32] merge_param:MergeParam "
        "switch_param:SwitchParam core_commands:[CoreCommands] run_core:uint32"
    ),
    "NetStatic": (),
    "NetDynamic": (),
    "NetParameter": _table(
        "input_tensor:[Tensor]! output_tensor:[Tensor]! ctx_addr:uint64 ctx_size:uint64 coeff_mem:CoeffMem "
        "is_dynamic:int32 n_dynamic:int32 h_w_dynamic:int32 cmd_group:[CmdGroup] net_profile:Binary "
        "stage_ir:[StageIR] binary_ir:Binary sub_net:[SubNet] cpu_mem_size:uint32 ctx_sizes:[uint64] "
        "net_stat:Binary core_num:uint32 io_addr:uint64 io_size:uint64 tensor_loc:Binary "
        "dynamic_ctx_addr:uint64 dynamic_coeff_offset:uint64 dynamic_combined_coeff_offset:uint64"
    ),
    "Cascade": _table("device_id:uint32 step:uint32 main_name:string"),
    "Net": _table(
        "name:string! net_static:[NetStatic] net_dynamic:[NetDynamic] parameter:[NetParameter] "
        "cascade:Cascade addr_mode:int32"
    ),
    "KernelModule": _table("file_name:string! binary:Binary! mode:int32"),
    "CpuopModule": _table("file_name:string! binary:Binary!"),
    "Model": _table(
        "type:string! version:string! time:string! chip:string! net:[Net]! neuron_size:uint64 "
        "kernel_module:KernelModule device_num:uint32 cpuop_module:CpuopModule bmodel_type:uint32 "
        "lib_backend:Binary"
    ),
}

#: Tensor.data_type -> (name, bytes per element; 0.5 for the 4-bit kinds)
DATA_TYPES: dict[int, tuple[str, float]] = {
    0: ("float32", 4),
    1: ("float16", 2),
    2: ("int8", 1),
    3: ("uint8", 1),
    4: ("int16", 2),
    5: ("uint16", 2),
    6: ("int32", 4),
    7: ("uint32", 4),
    8: ("bfloat16", 2),
    9: ("int4", 0.5),
    10: ("uint4", 0.5),
}
