"""The reference of everything: the unpatched upstream model, run in fp32 on the CPU with its own config.

The checkout's own model class runs whole, from token ids to logits: its forward, its masks and its
cache are untouched. What each block takes and gives is recorded by hooks. A model that does not fit in memory
runs with one layer's weights loaded at a time, and reads its tables of words by the row.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.model_code import ModelCode

if TYPE_CHECKING:
    import torch

    from qwen_surgery.weights import TensorRef

#: Weights are held in memory as a whole up to this many bytes of float32, else layer by layer.
WHOLE_MODEL_BYTES = 2 << 30
_ROWS_AT_A_TIME = 8192


@dataclass
class Pass:
    """What one forward pass over L new tokens did. All arrays are float32.

    ``block_inputs`` and ``block_outputs`` map a recorded layer to [L, H]; ``keys`` and ``values`` to the L
    new units [L, n, d]; ``past_keys`` and ``past_values`` to the units before them [P, n, d]. ``logits`` [V]
    are those after the last token, as they leave the model, and ``last_hidden`` [H] is what they were made
    from, before the final norm; both are None when the reference has only the model's first layers. ``order``
    are the layers as they ran.
    """

    tokens: tuple[int, ...]
    start: int
    block_inputs: dict[int, np.ndarray] = field(default_factory=dict)
    block_outputs: dict[int, np.ndarray] = field(default_factory=dict)
    keys: dict[int, np.ndarray] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    past_keys: dict[int, np.ndarray] = field(default_factory=dict)
    past_values: dict[int, np.ndarray] = field(default_factory=dict)
    logits: np.ndarray | None = None
    last_hidden: np.ndarray | None = None
    order: list[int] = field(default_factory=list)


class ReferenceModel:
    """The unpatched model of a checkout. ``weights`` is how many a pass reads when it is ``streamed``.

    *files* are the unpatched Python files and config.json, *index* the checkpoint's tensors. *layers* are the
    layers to record (all by default). *kept* (rising) leaves only these layers, each fed by the one before it
    in *kept*, and no logits: the model's first layers then compute what they compute in the whole model.
    Raises Refused when the code's parameters and the checkpoint's tensors do not match. Runs the checkout's
    code: callers have asked for ``--trust-remote-code``.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        index: Mapping[str, TensorRef],
        *,
        modeling: str = "modeling_qwen.py",
        layers: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        whole_model_bytes: int = WHOLE_MODEL_BYTES,
    ) -> None:
        import torch

        from qwen_surgery.exporting.modules import weightless

        code = ModelCode.load(files, modeling)
        # Newer versions warn about arguments that the unpatched code gives; it stays as it is.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._family = code.family
        self._anatomy = anatomy = code.family.anatomy
        self._tables = (anatomy.table_tensor, anatomy.head_tensor)
        with weightless():
            self._model: Any = code.model()
        self._body: Any = getattr(self._model, anatomy.body)
        stack = getattr(self._body, anatomy.layers)
        self._kept = tuple(range(len(stack)) if kept is None else kept)
        self._cut = len(self._kept) < len(stack)
        if self._cut:
            stack = torch.nn.ModuleList([stack[i] for i in self._kept])
            setattr(self._body, anatomy.layers, stack)
        self._index = index
        self._tied = anatomy.head_tensor not in index
        self.layer_count = len(stack)
        self.layers = self._kept if layers is None else tuple(layers)
        self._places = self._match_parameters()
        held = [name for name in self._places if not (self._cut and name in self._tables)]
        self.weights = sum(self._index[self._tensor(name)].numel for name in held)
        self.streamed = 4 * self.weights > whole_model_bytes
        self._pass: Pass | None = None
        self._past: Any = None
        self.length = 0
        self._install()

    def _match_parameters(self) -> dict[str, tuple[Any, str]]:
        """Parameter name -> (module, attribute), each checked against the checkpoint."""
        places: dict[str, tuple[Any, str]] = {}
        for prefix, module in self._model.named_modules():
            for attribute, value in module._parameters.items():
                if value is None:
                    continue
                name = f"{prefix}.{attribute}"
                tensor = self._tensor(name)
                if tensor not in self._index:
                    raise Refused(f"tensor {tensor} is not in the checkpoint, the code wants it")
                if tuple(value.shape) != tuple(self._index[tensor].shape):
                    raise Refused(
                        f"tensor {tensor} has shape {list(self._index[tensor].shape)}, "
                        f"the code wants {list(value.shape)}"
                    )
                places[name] = (module, attribute)
        return places

    def _tensor(self, name: str) -> str:
        """What the parameter *name* is called in the checkpoint, which has the layers that were left out."""
        table, head = self._tables
        if self._tied and name == head:
            return table
        if not name.startswith(self._anatomy.every_layer):
            return name
        place, _, rest = name.removeprefix(self._anatomy.every_layer).partition(".")
        return self._anatomy.layer(self._kept[int(place)]) + rest

    def _load(self, names: Sequence[str]) -> None:
        import torch

        for name in names:
            module, attribute = self._places[name]
            value = torch.from_numpy(np.ascontiguousarray(self._index[self._tensor(name)].read()))
            module._parameters[attribute] = torch.nn.Parameter(value, requires_grad=False)

    def _unload(self, names: Sequence[str]) -> None:
        import torch

        for name in names:
            module, attribute = self._places[name]
            shape = module._parameters[attribute].shape
            # Not a number: code that reads a weight that is not there must not get away with it.
            module._parameters[attribute] = torch.nn.Parameter(
                torch.full((), torch.nan).expand(shape), requires_grad=False
            )

    def _install(self) -> None:
        left = self._read_by_rows() if self.streamed or self._cut else set()
        inside = self._anatomy.every_layer
        left |= {name for name in self._places if self.streamed and name.startswith(inside)}
        self._load([name for name in self._places if name not in left])
        self._unload(sorted(left))
        for place, block in enumerate(getattr(self._body, self._anatomy.layers)):
            block.register_forward_pre_hook(self._before(place), with_kwargs=True)
            block.register_forward_hook(self._after(place), with_kwargs=True)

    def _read_by_rows(self) -> set[str]:
        """Have plain tables read from the checkpoint where they are used; the names of their parameters."""
        from torch import nn

        table: Any = getattr(self._body, self._anatomy.table)
        head: Any = getattr(self._model, self._anatomy.head)
        found = set()
        if type(table) is nn.Embedding:
            object.__setattr__(table, "forward", self._embed)
            found.add(self._tables[0])
        if type(head) is nn.Linear and head.bias is None:
            object.__setattr__(head, "forward", self._product)
            found.add(self._tables[1])
        return found

    def _layer_parameters(self, place: int) -> list[str]:
        return [name for name in self._places if name.startswith(self._anatomy.layer(place))]

    def _before(self, place: int) -> Any:
        i = self._kept[place]

        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.streamed:
                self._load(self._layer_parameters(place))
            states = args[0] if args else kwargs["hidden_states"]
            if self._pass is not None:
                self._pass.order.append(i)
                if i in self.layers:
                    self._pass.block_inputs[i] = states[0].numpy().copy()

        return hook

    def _after(self, place: int) -> Any:
        i = self._kept[place]

        def hook(_module: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
            if self.streamed:
                self._unload(self._layer_parameters(place))
            record = self._pass
            if record is None:
                return
            step = self._family.layer_step(output, given, i)
            states = step.states
            if i in self.layers:
                record.block_outputs[i] = states[0].numpy().copy()
                for whole, new, past in (
                    (step.key, record.keys, record.past_keys),
                    (step.value, record.values, record.past_values),
                ):
                    units = whole[0].numpy().copy()
                    new[i], past[i] = units[record.start :], units[: record.start]
            if place == self.layer_count - 1 and not self._cut:
                record.last_hidden = states[0, -1].numpy().copy()

        return hook

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """The embedding's forward: [1, L] -> [1, L, H], the rows read from the checkpoint."""
        import torch

        rows = self._index[self._tables[0]].read_rows(ids.ravel().tolist())
        return torch.from_numpy(rows).reshape(*ids.shape, -1)

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output layer's forward: [1, L, H] -> [1, 1, V], the last token's alone, some rows at a time."""
        import torch

        table = self._index[self._tensor(self._tables[1])]
        parts = []
        for first in range(0, table.shape[0], _ROWS_AT_A_TIME):
            rows = range(first, min(first + _ROWS_AT_A_TIME, table.shape[0]))
            parts.append(hidden[:, -1:] @ torch.from_numpy(table.read_rows(rows)).T)
        return torch.cat(parts, dim=-1)

    def _forward(self, tokens: Sequence[int]) -> Pass:
        import torch

        self._pass = Pass(tuple(tokens), self.length)
        with torch.no_grad():
            # Without its last layers a model has no logits: then only the stack runs.
            run = self._body if self._cut else self._model
            result, self._past = self._family.whole_step(run, torch.tensor([list(tokens)]), self._past)
        if not self._cut:
            self._pass.logits = result.logits[0, -1].numpy().copy()
        record, self._pass = self._pass, None
        _refuse_other_order(record.order, self._kept)
        self.length += len(tokens)
        return record

    def prefill(self, tokens: Sequence[int]) -> Pass:
        """Read a prompt from the start."""
        self._past, self.length = None, 0
        return self._forward(tokens)

    def decode(self, token: int) -> Pass:
        """Read one more token through the cache."""
        if self._past is None:
            raise Refused("decode needs a prefill before it")
        return self._forward([token])


def _refuse_other_order(order: Sequence[int], layers: Sequence[int]) -> None:
    if list(order) != list(layers):
        raise Refused(
            f"the model's forward runs the layers {', '.join(map(str, order))}, and the nets run each of the "
            f"{len(layers)} once, in order",
            hint="look at the loop over the layers in the model's forward",
        )
