"""The nodes that make a quantised weight of a checkpoint out of its stored integers, inside an ONNX net.

So an exported net binds the shards' own bytes, quantised or not. onnxruntime folds these nodes away when it
opens the net; TPU-MLIR does not know them and gets plain weights (:func:`.plain.plain_net`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.weights.quantised import AWQ_FIELDS, QuantisedRef

if TYPE_CHECKING:
    import onnx


class _Writer:
    """Adds nodes of one weight to *graph*, named after it."""

    def __init__(self, graph: onnx.GraphProto, name: str) -> None:
        self._graph, self._name = graph, name
        self.nodes: list[onnx.NodeProto] = []

    def constant(self, values: np.ndarray) -> str:
        import onnx

        name = f"{self._name}/constant_{len(self._graph.initializer)}"
        self._graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        return name

    def add(self, op: str, *inputs: str, into: str = "", **attributes: Any) -> str:
        """A node; the name of its result, which is *into* where that is given."""
        import onnx

        result = into or f"{self._name}/{op.lower()}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, list(inputs), [result], name=result, **attributes))
        return result

    def cast(self, value: str) -> str:
        """*value* as float32."""
        return self.add("Cast", value, to=1)

    def shaped(self, value: str, *sizes: int) -> str:
        return self.add("Reshape", value, self.constant(np.array(sizes, np.int64)))

    def fields(self, data: str, bits: int, rows: int) -> str:
        """The fields of the bytes *data* [rows, words, 4]: uint8 [rows, words, 32 / bits]."""
        if bits == 8:
            return data
        four = self.constant(np.array(4, np.uint8))
        low = self.add(
            "BitShift", self.add("BitShift", data, four, direction="LEFT"), four, direction="RIGHT"
        )
        high = self.add("BitShift", data, four, direction="RIGHT")
        last = self.constant(np.array([3], np.int64))
        pair = self.add("Concat", *(self.add("Unsqueeze", one, last) for one in (low, high)), axis=3)
        return self.shaped(pair, rows, -1, 8)

    def by_outputs(self, data: str, ref: QuantisedRef, rows: int) -> str:
        """[rows, outputs] of the bytes *data* [rows, words, 4] of words whose fields are outputs."""
        fields = self.fields(data, ref.release.bits, rows)
        if ref.release.method == "awq":
            fields = self.add("Gather", fields, self.constant(np.array(AWQ_FIELDS, np.int64)), axis=2)
        return self.shaped(fields, rows, -1)


def bytes_shape(ref: QuantisedRef) -> dict[str, tuple[int, ...]]:
    """The shapes of codes and zeros as bytes, four to a word."""
    return {"codes": (*ref.codes.shape, 4), "zeros": (*ref.zeros.shape, 4)}


def weight_nodes(
    graph: onnx.GraphProto, ref: QuantisedRef, stored: dict[str, str], result: str
) -> list[onnx.NodeProto]:
    """Nodes that make *result*, float32 [O, I], of the tensors *stored*: ``codes`` and ``zeros`` as bytes
    (:func:`bytes_shape`), ``scales`` float16. Its values are those of :meth:`.QuantisedRef.read`."""
    write = _Writer(graph, result)
    (outputs, inputs), groups = ref.shape, ref.scales.shape[0]
    if ref.release.method == "awq":
        codes = write.add("Transpose", write.by_outputs(stored["codes"], ref, inputs), perm=[1, 0])
    else:
        fields = write.fields(stored["codes"], ref.release.bits, ref.codes.shape[0])
        codes = write.add("Transpose", fields, perm=[1, 0, 2])
    codes = write.cast(write.shaped(codes, outputs, groups, ref.group))
    zeros = write.cast(write.by_outputs(stored["zeros"], ref, groups))
    if ref.release.less_one:
        zeros = write.add("Add", zeros, write.constant(np.array(1, np.float32)))
    zeros, scales = (
        write.shaped(write.add("Transpose", one, perm=[1, 0]), outputs, groups, 1)
        for one in (zeros, write.cast(stored["scales"]))
    )
    exact = write.add("Mul", write.add("Sub", codes, zeros), scales)
    halves = write.add("Cast", write.shaped(exact, outputs, inputs), to=10)  # float16, as the release rounds
    write.add("Cast", halves, into=result, to=1)
    return write.nodes
