"""The unpatched upstream model, whole, in fp32 on the CPU: what every later stage is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwen_surgery.errors import Refused
from qwen_surgery.exporting.model_code import ModelCode
from qwen_surgery.weights import TensorRef

_MODEL = "QWenModel"
_PREFIX = "transformer."


@dataclass(frozen=True)
class Step:
    """What the model computed for the tokens of one call (L of them), all float32.

    ``logits`` [L, V]; ``hidden[i]`` [L, H] is the input of layer i, ``hidden[N]`` the last layer's output
    (before the final norm); ``keys[i]`` and ``values[i]`` [L, n, d] are layer i's new KV units.
    """

    logits: np.ndarray
    hidden: tuple[np.ndarray, ...]
    keys: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]


class ReferenceModel:
    """Upstream's own model class with its own config, run token by token.

    *files* are the unpatched sources (name -> content), *weights* maps checkpoint tensors to their places.
    Only the precision and flash-attention switches of the config are changed: it runs in fp32 on the CPU.
    Runs the checkout's code: callers ask for trust first. Needs the whole model in memory as fp32.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        weights: Mapping[str, TensorRef],
        modeling: str = "modeling_qwen.py",
    ) -> None:
        code = ModelCode.load(files, modeling)
        model_class = getattr(code.module, _MODEL, None)
        if model_class is None:
            raise Refused(f"{modeling} has no class {_MODEL}")
        with torch.no_grad():
            self._model: Any = model_class(code.config).float().eval()
            _load(self._model, weights)
            head = weights["lm_head.weight" if "lm_head.weight" in weights else _PREFIX + "wte.weight"]
            self._head = torch.from_numpy(head.read())
        self._layers = list(self._model.h)
        self._past: Any = None

    @property
    def layers(self) -> int:
        return len(self._layers)

    def prefill(self, tokens: Sequence[int]) -> Step:
        """Start over with *tokens*."""
        self._past = None
        return self._run(tokens)

    def decode(self, token: int) -> Step:
        """One more token after what was given so far; raises ValueError before any prefill."""
        if self._past is None:
            raise ValueError("decode needs a prefill first")
        return self._run([token])

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """The *count* greedy tokens that follow *tokens*."""
        step = self.prefill(tokens)
        result = [int(step.logits[-1].argmax())]
        while len(result) < count:
            result.append(int(self.decode(result[-1]).logits[-1].argmax()))
        return result

    def _run(self, tokens: Sequence[int]) -> Step:
        captured: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(_capture(captured), with_kwargs=True) for layer in self._layers
        ]
        hooks.append(self._layers[-1].register_forward_hook(lambda m, args, out: captured.append(out[0])))
        try:
            with torch.no_grad():
                out = self._model(
                    torch.tensor([list(tokens)], dtype=torch.long),
                    past_key_values=self._past,
                    use_cache=True,
                    output_attentions=False,
                    output_hidden_states=False,
                    return_dict=False,
                )
                logits = out[0][0] @ self._head.T
        finally:
            for hook in hooks:
                hook.remove()
        self._past = out[1]
        count = len(tokens)
        return Step(
            logits=logits.numpy(),
            hidden=tuple(state[0].numpy().copy() for state in captured),
            keys=tuple(past[0][0, -count:].numpy().copy() for past in self._past),
            values=tuple(past[1][0, -count:].numpy().copy() for past in self._past),
        )


def _capture(into: list[torch.Tensor]) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(args[0] if args else kwargs["hidden_states"])

    return hook


def _load(model: Any, weights: Mapping[str, TensorRef]) -> None:
    for name, parameter in model.named_parameters():
        ref = weights.get(_PREFIX + name)
        if ref is None:
            raise Refused(f"tensor {_PREFIX + name} is missing from the checkpoint")
        if tuple(ref.shape) != tuple(parameter.shape):
            raise Refused(
                f"{ref.file}: tensor {ref.name} has shape {list(ref.shape)}, the model wants "
                f"{list(parameter.shape)}"
            )
        parameter.copy_(torch.from_numpy(ref.read()))
