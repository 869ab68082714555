"""The worker's half of ``runtime/device.py``: the vendor's bmruntime, by its public C interface.

Runs in TPU-MLIR's Python, knows nothing of qwen_surgery. libbmlib and libbmrt are those of TPU-MLIR, the
chip below them is its emulator. What is declared here are facts of the interface: names, argument types and
the layout of what is passed by value, as the vendor documents them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

#: Flag of ``bmrt_set_flags``: nets share the memory of their activations.
SHARE_MEM = 1
#: bm_data_type_t -> numpy type and name; bf16 is its bits.
DTYPES = {0: (np.float32, "f32"), 1: (np.float16, "f16"), 6: (np.int32, "i32"), 8: (np.uint16, "bf16")}


class DeviceMemory(ctypes.Structure):
    """bm_device_mem_t: an address, what the driver keeps, and a size in bytes."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("reserved", ctypes.c_uint32),
        ("descriptor", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    ]


class BmShape(ctypes.Structure):
    """bm_shape_t."""

    _fields_ = [("count", ctypes.c_int), ("dims", ctypes.c_int * 8)]


class BmTensor(ctypes.Structure):
    """bm_tensor_t."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("shape", BmShape),
        ("memory", DeviceMemory),
        ("store_mode", ctypes.c_int),
    ]


class BmStage(ctypes.Structure):
    """bm_stage_info_t."""

    _fields_ = [
        ("input_shapes", ctypes.POINTER(BmShape)),
        ("output_shapes", ctypes.POINTER(BmShape)),
        ("input_memory", ctypes.POINTER(DeviceMemory)),
        ("output_memory", ctypes.POINTER(DeviceMemory)),
    ]


class NetInfo(ctypes.Structure):
    """bm_net_info_t."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("is_dynamic", ctypes.c_bool),
        ("input_count", ctypes.c_int),
        ("input_names", ctypes.POINTER(ctypes.c_char_p)),
        ("input_dtypes", ctypes.POINTER(ctypes.c_int)),
        ("input_scales", ctypes.POINTER(ctypes.c_float)),
        ("output_count", ctypes.c_int),
        ("output_names", ctypes.POINTER(ctypes.c_char_p)),
        ("output_dtypes", ctypes.POINTER(ctypes.c_int)),
        ("output_scales", ctypes.POINTER(ctypes.c_float)),
        ("stage_count", ctypes.c_int),
        ("stages", ctypes.POINTER(BmStage)),
        ("max_input_bytes", ctypes.POINTER(ctypes.c_size_t)),
        ("max_output_bytes", ctypes.POINTER(ctypes.c_size_t)),
        ("input_zero_points", ctypes.POINTER(ctypes.c_int)),
        ("output_zero_points", ctypes.POINTER(ctypes.c_int)),
        ("input_devices", ctypes.POINTER(ctypes.c_int)),
        ("output_devices", ctypes.POINTER(ctypes.c_int)),
        ("core_count", ctypes.c_int),
        ("addr_mode", ctypes.c_int32),
    ]


_HANDLE = ctypes.c_void_p
#: function -> (result, arguments); the first five are libbmlib's.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "bm_dev_request": (ctypes.c_int, [ctypes.POINTER(_HANDLE), ctypes.c_int]),
    "bm_memcpy_s2d": (ctypes.c_int, [_HANDLE, DeviceMemory, ctypes.c_void_p]),
    "bm_memcpy_d2s": (ctypes.c_int, [_HANDLE, ctypes.c_void_p, DeviceMemory]),
    "bm_memcpy_d2d_byte": (
        ctypes.c_int,
        [_HANDLE, DeviceMemory, ctypes.c_size_t, DeviceMemory, ctypes.c_size_t, ctypes.c_size_t],
    ),
    "bm_malloc_device_byte": (ctypes.c_int, [_HANDLE, ctypes.POINTER(DeviceMemory), ctypes.c_uint]),
    "bm_thread_sync": (ctypes.c_int, [_HANDLE]),
    "bmrt_create": (ctypes.c_void_p, [_HANDLE]),
    "bmrt_set_flags": (None, [ctypes.c_void_p, ctypes.c_uint32]),
    "bmrt_load_bmodel": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_char_p]),
    "bmrt_get_network_number": (ctypes.c_int, [ctypes.c_void_p]),
    "bmrt_get_network_name": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int]),
    "bmrt_get_network_info": (ctypes.POINTER(NetInfo), [ctypes.c_void_p, ctypes.c_char_p]),
    "bmrt_launch_tensor_ex": (
        ctypes.c_bool,
        [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(BmTensor), ctypes.c_int,
            ctypes.POINTER(BmTensor), ctypes.c_int, ctypes.c_bool, ctypes.c_bool,
        ],
    ),
}  # fmt: skip


def _library(libraries: list[ctypes.CDLL]) -> Any:
    """A namespace of the functions in use, each with its types."""
    found: dict[str, Any] = {}
    for name, (result, arguments) in _FUNCTIONS.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        found[name] = function
    return type("Functions", (), {name: staticmethod(function) for name, function in found.items()})


class Bmruntime:
    """One device with one bmodel in one runtime. Addresses and sizes in requests are in bytes."""

    def __init__(self, path: str, flags: str) -> None:
        self.call = _library([ctypes.CDLL("libbmlib.so"), ctypes.CDLL("libbmrt.so")])
        self.handle = _HANDLE()
        self._good("bm_dev_request", self.call.bm_dev_request(ctypes.byref(self.handle), 0))
        self.runtime = self.call.bmrt_create(self.handle)
        if not self.runtime:
            raise RuntimeError("bmrt_create gives no runtime")
        if int(flags):
            self.call.bmrt_set_flags(self.runtime, int(flags))
        if not self.call.bmrt_load_bmodel(self.runtime, path.encode()):
            raise RuntimeError(f"bmrt_load_bmodel refuses {path}")
        count = self.call.bmrt_get_network_number(self.runtime)
        names = [self.call.bmrt_get_network_name(self.runtime, i) for i in range(count)]
        self.nets = {name.decode(): self.call.bmrt_get_network_info(self.runtime, name)[0] for name in names}

    @staticmethod
    def _good(what: str, status: int) -> None:
        if status:
            raise RuntimeError(f"{what} gives status {status}")

    def answer(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        reply, outputs = getattr(self, f"do_{request['op']}")(request, arrays)
        return reply, outputs

    def do_nets(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        return {"nets": [_describe(name, net) for name, net in self.nets.items()]}, []

    def do_allocate(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        memory = DeviceMemory()
        status = self.call.bm_malloc_device_byte(self.handle, ctypes.byref(memory), request["size"])
        self._good("bm_malloc_device_byte", status)
        return {"address": memory.address}, []

    def do_write(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        data = np.ascontiguousarray(arrays[0])
        memory = _memory(request["to"], data.nbytes)
        self._good("bm_memcpy_s2d", self.call.bm_memcpy_s2d(self.handle, memory, data.ctypes.data))
        return {}, []

    def do_read(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        data = np.zeros(request["size"], np.uint8)
        memory = _memory(request["at"], data.nbytes)
        self._good("bm_memcpy_d2s", self.call.bm_memcpy_d2s(self.handle, data.ctypes.data, memory))
        return {}, [data]

    def do_copy(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        size = request["size"]
        target, source = _memory(request["to"], size), _memory(request["at"], size)
        status = self.call.bm_memcpy_d2d_byte(self.handle, target, 0, source, 0, size)
        self._good("bm_memcpy_d2d_byte", status)
        return {}, []

    def do_launch(self, request: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        name, net = request["net"], self.nets[request["net"]]
        inputs = _tensors(request["inputs"], net.input_dtypes)
        outputs = _tensors(request["outputs"], net.output_dtypes)
        done = self.call.bmrt_launch_tensor_ex(
            self.runtime, name.encode(), inputs, len(inputs), outputs, len(outputs), True, False
        )
        if not done:
            raise RuntimeError(f"bmrt_launch_tensor_ex refuses {name}")
        self._good("bm_thread_sync", self.call.bm_thread_sync(self.handle))
        return {}, []


def _memory(address: int, size: int) -> DeviceMemory:
    return DeviceMemory(address=address, size=size)


def _tensors(given: list[dict[str, Any]], dtypes: Any) -> Any:
    tensors = (BmTensor * len(given))()
    for i, (tensor, one) in enumerate(zip(tensors, given)):  # noqa: B905
        tensor.dtype = dtypes[i]
        tensor.shape.count = len(one["shape"])
        tensor.shape.dims[: len(one["shape"])] = one["shape"]
        tensor.memory = _memory(one["address"], one["size"])
    return tensors


def _describe(name: str, net: NetInfo) -> dict[str, Any]:
    stage = net.stages[0]

    def tensors(count: int, names: Any, dtypes: Any, shapes: Any, memory: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": names[i].decode(),
                "dtype": DTYPES[dtypes[i]][1],
                "shape": list(shapes[i].dims[: shapes[i].count]),
                "address": memory[i].address,
                "size": memory[i].size,
                "flags": memory[i].flags,
            }
            for i in range(count)
        ]

    return {
        "name": name,
        "io_alone": net.addr_mode == 1,
        "dynamic": net.is_dynamic,
        "inputs": tensors(
            net.input_count, net.input_names, net.input_dtypes, stage.input_shapes, stage.input_memory
        ),
        "outputs": tensors(
            net.output_count, net.output_names, net.output_dtypes, stage.output_shapes, stage.output_memory
        ),
    }
