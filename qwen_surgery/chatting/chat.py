"""A conversation with an exported or compiled model, through the runtime that verification uses."""

from __future__ import annotations

import codecs
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_surgery.errors import Refused, Usage
from qwen_surgery.nets import TOP_K, Geometry
from qwen_surgery.runtime.host import Sampling
from qwen_surgery.tokenizer import Tokenizer, read_json
from qwen_surgery.verification.engines import Engine, OrtEngine
from qwen_surgery.verification.language import SYSTEM
from qwen_surgery.verification.runtime import Runtime, draw

if TYPE_CHECKING:
    from qwen_surgery.runtime.several import DevicesEngine
    from qwen_surgery.toolchain.emulator import ChipEngine


@dataclass(frozen=True)
class Generation:
    """What generation_config.json says of how answers are made. ``sampling`` None means the best token."""

    sampling: Sampling | None = None
    stops: tuple[int, ...] = ()
    max_tokens: int = 256

    @classmethod
    def of(cls, folder: Path) -> Generation:
        """From the file in *folder*; greedy where it is missing or says so. Raises Refused for one that is no
        JSON or gives a setting that is no number.
        """
        data = read_json(folder / "generation_config.json")
        try:
            ends = data.get("eos_token_id", [])
            best = int(data.get("top_k", TOP_K))
            sampling = Sampling(
                float(data.get("top_p", 1.0)),
                float(data.get("temperature", 1.0)),
                float(data.get("repetition_penalty", 1.0)),
                top_k=best if 0 < best < TOP_K else TOP_K,  # 0 is no limit, and no head holds more
            )
            return cls(
                sampling if data.get("do_sample") else None,
                tuple(int(end) for end in (ends if isinstance(ends, list) else [ends])),
                int(data.get("max_new_tokens", cls.max_tokens)),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise Refused(f"{folder / 'generation_config.json'}: a setting is no number ({error})") from None


def open_onnx(folder: Path) -> tuple[Engine, Geometry]:
    """An exported folder on onnxruntime and its geometry."""
    engine = OrtEngine(folder)
    return engine, engine.manifest.geometry


def chip_geometry(engine: ChipEngine | DevicesEngine) -> Geometry:
    """The geometry that a bmodel's tensors speak of (``intermediate`` is not among them and 0 here).

    Raises Refused when it has no block_cache_0 or no lm_head.
    """
    if not {"block_cache_0", "lm_head", "embedding"} <= set(engine.nets):
        raise Refused(f"{engine.bmodel} is no model of this contract: it has {', '.join(engine.nets)}")
    inputs = engine.describe("block_cache_0")[0]
    _, seq_length, heads, head_dim = inputs[3].shape
    logits = engine.describe("lm_head")[1][0].shape
    layers = sum(name.startswith("block_cache_") for name in engine.nets)
    return Geometry(layers, inputs[0].shape[-1], heads, head_dim, logits[-1], 0, seq_length)


@dataclass
class Chat:
    """One conversation. ``sampling`` None means greedy; ``system`` None begins it as the model's chat format
    does unasked. Raises Usage when a prompt does not fit in S, Refused when the model computes no numbers.
    """

    engine: Engine
    geometry: Geometry
    tokenizer: Tokenizer
    sampling: Sampling | None = None
    system: str | None = None
    stops: tuple[int, ...] = ()  # beside the tokenizer's own
    turns: list[tuple[str, str]] = field(default_factory=list)
    spoken: int = 0  # tokens of the latest answer, and the seconds they took
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if 1 < self.geometry.vocab < self.tokenizer.size:
            raise Refused(
                f"the tokenizer has {self.tokenizer.size} tokens, the model {self.geometry.vocab}",
                hint="give the --tokenizer of the model that was exported",
            )
        self._generator = np.random.default_rng(self.sampling.seed if self.sampling else 0)

    def say(self, text: str, limit: int) -> Generator[str, None, None]:
        """The answer to *text*, piece by piece, at most *limit* tokens; pieces are whole characters.

        An answer that is stopped half way (the iterator closed) stays in the conversation as far as it got.
        """
        system = SYSTEM if self.system is None and self.tokenizer.template is None else self.system
        first = [] if system is None else [("system", system)]
        prompt = self.tokenizer.chat([*first, *self.turns, ("user", text)])
        room = self.geometry.seq_length - len(prompt)
        if room < 1:
            raise Usage(
                f"the conversation takes {len(prompt)} of {self.geometry.seq_length} tokens",
                hint="start a new conversation, or export with a longer --seq-length",
            )
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        answer, began = "", time.monotonic()
        self.spoken, self.seconds = 0, 0.0
        try:
            for token in self._tokens(prompt, min(limit, room)):
                self.spoken, self.seconds = self.spoken + 1, time.monotonic() - began
                piece = decoder.decode(self.tokenizer.decode_bytes([token]))
                answer += piece
                if piece:
                    yield piece
            rest = decoder.decode(b"", final=True)
            answer += rest
            if rest:
                yield rest
        finally:
            self.turns += [("user", text), ("assistant", answer)]

    def _tokens(self, prompt: list[int], limit: int) -> Iterator[int]:
        run = Runtime(self.engine, self.geometry)
        logits = run.prefill(prompt)
        for made in range(limit):
            token = self._choose(run, logits)
            if token in self.tokenizer.stops or token in self.stops:
                return
            yield token
            if made + 1 < limit:
                logits = run.decode(token)

    def _choose(self, run: Runtime, logits: Any) -> int:
        if not np.isfinite(logits).all():
            raise Refused(
                "the model's logits are NaN or infinite: it cannot talk",
                hint="`qwen-surgery verify` says which net goes wrong first",
            )
        if self.sampling is None:
            return run.greedy(logits)
        return draw(*run.candidates(logits, self.sampling), float(self._generator.random()))
