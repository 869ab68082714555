"""What can be asked of a compile, and which combinations make no sense.

Everything that cannot work is refused here, before a tool runs. Where the reference scripts accept
something that the demos then cannot use (an f16 model whose embedding still gives bf16 bits), the message
says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from qwen_surgery.chips import CHIPS, DEFAULT_CHIP, Chip, with_ability
from qwen_surgery.errors import Refused, Usage
from qwen_surgery.nets import Geometry, Net, NetKind, nets
from qwen_surgery.weights.quantised import Release

#: --mode -> TPU-MLIR's quantisation of blocks and lm_head.
QUANTIZE = {"bf16": "BF16", "f16": "F16", "int8": "W8BF16", "int4": "W4BF16"}
ADDR_MODES = ("io_alone", "basic")
#: How integers are chosen: as the compiler rounds, by a search for each group's best scale, or by what a text
#: does inside the model.
QUANTIZERS = ("rtn", "search", "gptq")
SEARCH, GPTQ = QUANTIZERS[1:]
#: Group size the reference scripts give int4. int8 has what TPU-MLIR gives it: 64 in 1.30, a row in 1.6.
INT4_GROUP = 64
#: The mode of the lm_head where the checkpoint's own integers are kept, and it has none for the lm_head.
RELEASE_HEAD = "int8"


def release_mode(release: Release) -> str:
    """The --mode that keeps the integers of *release*."""
    return f"int{release.bits}"


@dataclass(frozen=True)
class VendorRuntime:
    """What one vendor runtime takes, as its demo and compile script show.

    ``fused_head``: the lm_head ends in top-1 and gives a token, also on one device. ``count`` says how the
    runtime finds the number of layers N from the number of nets.
    """

    name: str
    modes: tuple[str, ...]
    fused_head: bool
    dynamic: bool
    count: str
    #: Passes that its demos need beside those that always run.
    passes: tuple[str, ...] = ()
    #: The head that its demos sample by, where they do.
    sampler: NetKind = NetKind.PENALTY_SAMPLE_HEAD
    #: Why no file for it can be for several devices; empty where one can.
    one_device: str = ""

    @property
    def chips(self) -> tuple[str, ...]:
        """The names of the chips it runs on."""
        return tuple(chip.name for chip in CHIPS.values() if self.name in chip.runtimes)


RUNTIMES = {
    "llm-tpu": VendorRuntime("llm-tpu", ("bf16", "int8", "int4"), False, True, "(nets - 5) / 2"),
    "sophon-demo": VendorRuntime(
        "sophon-demo", ("bf16", "f16", "int8", "int4"), False, True,
        "(nets - 5) / 2 with a greedy_head, (nets - 3) / 2 without",
    ),
    "sophon-demo-2024.1": VendorRuntime(
        "sophon-demo-2024.1", ("bf16", "int8", "int4"), True, False, "(nets - 2) // 2",
        # It writes float16's -10000 as mask, whatever the nets' type is.
        ("bounded-mask",),
        one_device="its masks need a floor (bounded-mask), behind which TPU-MLIR splits no attention",
    ),
    "llm-tpu-generic": VendorRuntime(
        "llm-tpu-generic", ("bf16", "f16", "int8", "int4"), False, True,
        "(nets - 3 - greedy_head - sample_head) / 2", sampler=NetKind.SAMPLE_HEAD,
        one_device="it is for sampling, and a model on several chips gives tokens",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class CompileOptions:
    """One compile. ``None`` means: what the runtime and target call for (see :meth:`resolved`).

    ``num_core`` is for chips of several cores: how many, or None for a file for each count, as the reference
    script makes. ``lm_head_mode`` keeps the lm_head at another precision than the blocks. ``q_group_size``
    counts input features per scale. ``quantizer`` is one of :data:`QUANTIZERS`.
    """

    mode: str = "int4"
    target: str = DEFAULT_CHIP
    name: str = "qwen"
    num_device: int = 1
    num_core: int | None = None
    addr_mode: str = "io_alone"
    dynamic: bool = False
    q_group_size: int | None = None
    symmetric: bool = False
    lm_head_mode: str | None = None
    runtime: str | None = None
    quantizer: str = QUANTIZERS[0]

    def resolved(self, geometry: Geometry | None = None, release: Release | None = None) -> CompileOptions:
        """These options with every default filled in; raises :class:`Usage` for what cannot work.

        *release* says how the checkpoint is quantised, where it is: then its bits and groups are fixed.
        """
        runtime = self._runtime()
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise Usage(f"--name {self.name!r} is no file name", hint="it is the first part of one")
        if self.mode not in QUANTIZE:
            raise Usage(f"--mode {self.mode} is unknown", hint="modes: " + ", ".join(QUANTIZE))
        if self.target not in runtime.chips:
            raise Usage(
                f"--runtime {runtime.name} runs on {', '.join(runtime.chips)}, not on {self.target}",
                hint=f"{self.target} needs --runtime {' or '.join(self.chip.runtimes)}",
            )
        if self.mode not in runtime.modes:
            raise Usage(
                f"--runtime {runtime.name} cannot run --mode {self.mode}: its masks are bf16 bits",
                hint="use --runtime sophon-demo, or --mode bf16",
            )
        self._check_devices(runtime)
        if release is not None:
            self._check_release(release)
        if self.num_device > 1:
            refuse_unsplit(self, geometry)
        group = self._group(geometry, release)
        if self.symmetric and self.mode != "int4":
            raise Usage(f"--symmetric has no effect on --mode {self.mode}", hint="it belongs to --mode int4")
        self._check_head()
        # A release keeps its output layer in float16, of which int8 loses next to nothing.
        head = self.lm_head_mode or (self.mode if release is None else RELEASE_HEAD)
        self._check_quantizer(head, release)
        return replace(self, runtime=runtime.name, q_group_size=group, lm_head_mode=head)

    @property
    def chip(self) -> Chip:
        """The row of the target; raises :class:`Usage` for an unknown one."""
        if self.target not in CHIPS:
            raise Usage(f"--target {self.target} is unknown", hint="chips: " + ", ".join(CHIPS))
        return CHIPS[self.target]

    def _runtime(self) -> VendorRuntime:
        """The one that was asked for, else the chip's preferred one of those that run the mode."""
        fitting = (name for name in self.chip.runtimes if self.mode in RUNTIMES[name].modes)
        name = self.runtime or next(fitting, self.chip.runtimes[0])
        if name not in RUNTIMES:
            raise Usage(f"--runtime {name} is unknown", hint="runtimes: " + ", ".join(RUNTIMES))
        return RUNTIMES[name]

    def _check_devices(self, runtime: VendorRuntime) -> None:
        if self.num_device < 1:
            raise Usage("--num-device must be at least 1")
        if self.num_device > 1 and not self.chip.several_devices:
            raise Usage(
                f"--num-device {self.num_device} needs {with_ability('several_devices')}; "
                f"{self.target} is one chip on its board"
            )
        if self.num_device > 1 and runtime.one_device:
            raise Usage(
                f"--runtime {runtime.name} does not go with --num-device: {runtime.one_device}",
                hint="use --runtime llm-tpu",
            )
        if self.num_core not in (None, *self.chip.cores):
            able = ", ".join(chip.name for chip in CHIPS.values() if self.num_core in chip.cores)
            raise Usage(
                f"--num-core {self.num_core} needs {able or 'a chip that is not known'}",
                hint=f"{self.target} takes {' or '.join(map(str, self.chip.cores))}",
            )
        if self.addr_mode not in ADDR_MODES:
            raise Usage(f"--addr-mode {self.addr_mode} is unknown", hint="modes: " + ", ".join(ADDR_MODES))
        if self.dynamic and not self.chip.dynamic:
            raise Usage(
                f"--dynamic is not supported on {self.target}", hint=f"it needs {with_ability('dynamic')}"
            )
        if self.dynamic and self.num_device > 1:
            raise Usage(
                "--dynamic does not go with --num-device: the dynamic parts of some models end the emulator, "
                "and demo_parallel keeps the hidden states where a dynamic block works while it reads them",
                hint="leave --dynamic out",
            )
        if self.dynamic and not runtime.dynamic:
            raise Usage(
                f"--runtime {runtime.name} always gives the whole sequence length: --dynamic has no use"
            )

    def _check_release(self, release: Release) -> None:
        """The checkpoint's integers are kept, so what decides integers is decided."""
        if self.mode != release_mode(release):
            raise Usage(
                f"--mode {self.mode} does not go with this checkpoint ({release})",
                hint=f"leave --mode out, or use --mode {release_mode(release)}",
            )
        if self.symmetric:
            raise Usage("--symmetric has no effect: the checkpoint's own zeros are kept", hint="leave it out")
        if self.q_group_size not in (None, release.group):
            raise Usage(
                f"--q-group-size {self.q_group_size} does not go with this checkpoint ({release})",
                hint="leave it out",
            )
        if self.num_device > 1:
            raise Refused(
                f"the integers of this checkpoint ({release}) cannot be kept on several chips: there "
                "TPU-MLIR splits weights, across groups, and rounds them again",
                hint="use one chip, or start from the bf16 or fp16 checkpoint",
            )

    def _group(self, geometry: Geometry | None, release: Release | None) -> int | None:
        if release is not None and release.group != -1:
            return release.group
        if self.q_group_size is None and self.mode != "int4":
            return None  # int8 gets what TPU-MLIR gives it
        if not self.mode.startswith("int"):
            raise Usage(
                f"--q-group-size has no effect on --mode {self.mode}: it keeps no integers",
                hint="leave it out, or use --mode int4 or int8",
            )
        group = INT4_GROUP if self.q_group_size is None else self.q_group_size
        if group < 1:
            raise Usage("--q-group-size must be positive")
        for what, size in _group_axes(geometry):
            if size % group:
                raise Usage(f"--q-group-size {group} does not divide the {what} of {size}")
        return group

    def _check_head(self) -> None:
        if self.lm_head_mode is None:
            return
        if self.lm_head_mode not in QUANTIZE:
            raise Usage(
                f"--lm-head-mode {self.lm_head_mode} is unknown", hint="modes: " + ", ".join(QUANTIZE)
            )
        if (self.lm_head_mode == "f16") != (self.mode == "f16"):
            raise Usage(
                f"--lm-head-mode {self.lm_head_mode} does not go with --mode {self.mode}: "
                "the blocks' output bits go to the lm_head unchanged, so both must be f16 or both bf16"
            )
        order = list(QUANTIZE)
        if order.index(self.lm_head_mode) > order.index(self.mode):
            raise Usage(f"--lm-head-mode {self.lm_head_mode} is a lower precision than --mode {self.mode}")

    def _check_quantizer(self, head: str, release: Release | None) -> None:
        if self.quantizer not in QUANTIZERS:
            raise Usage(
                f"--quantizer {self.quantizer} is unknown", hint="quantizers: " + ", ".join(QUANTIZERS)
            )
        if self.quantizer == QUANTIZERS[0]:
            return
        if not replace(self, lm_head_mode=head).integers:
            raise Usage(f"--quantizer {self.quantizer} has no effect: no weight is kept as integers")
        if self.quantizer == GPTQ and release is not None:
            raise Usage(
                f"--quantizer {GPTQ} does not go with this checkpoint ({release}): its integers are kept",
                hint=f"leave it out, or use --quantizer {SEARCH} for the lm_head",
            )
        if self.num_device > 1:
            raise Usage(
                f"--quantizer {self.quantizer} is for one chip: for several, TPU-MLIR rounds every layer"
            )

    # What follows from them, on resolved options:

    def integer(self, kind: NetKind) -> bool:
        """Whether nets of *kind* keep weights as integers."""
        head = kind in (NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK)
        mode = self.mode if kind.per_layer else (self.lm_head_mode or self.mode) if head else ""
        return mode.startswith("int")

    @property
    def integers(self) -> bool:
        """Whether any net keeps weights as integers."""
        return self.integer(NetKind.BLOCK) or self.integer(NetKind.LM_HEAD)

    @property
    def float_mode(self) -> str:
        """``bf16`` or ``f16``: the type of hidden states, masks, the KV cache and stored embeddings."""
        return "f16" if self.mode == "f16" else "bf16"

    @property
    def fused_head(self) -> bool:
        """Whether the lm_head gives the token itself."""
        return self.num_device > 1 or self.runs_on.fused_head

    @property
    def runs_on(self) -> VendorRuntime:
        """The row of the runtime; of the chip's preferred one before options are resolved."""
        return RUNTIMES[self.runtime or self.chip.runtimes[0]]

    @property
    def cores(self) -> tuple[int, ...]:
        """One bmodel is made for each of these core counts."""
        return self.chip.cores if self.num_core is None else (self.num_core,)

    def nets(self, layers: int) -> tuple[Net, ...]:
        """The nets of the bmodel, in its order."""
        return nets(
            layers,
            heads=self.chip.heads,
            multi_device=self.fused_head,
            sampler=self.runs_on.sampler,
        )

    def file_name(self, seq_length: int, cores: int = 1) -> Path:
        """Where the bmodel goes, relative to the output folder: ``BM1684X/qwen_int4_seq512_1dev.bmodel``."""
        chip = f"_{self.target}" if self.chip.in_file_name else ""
        several = f"_{cores}core" if cores > 1 else ""
        dynamic = "_dyn" if self.dynamic else ""
        stem = f"{self.name}_{self.mode}_seq{seq_length}{chip}_{self.num_device}dev{several}{dynamic}"
        return Path(self.target.upper()) / f"{stem}.bmodel"


def _group_axes(geometry: Geometry | None) -> tuple[tuple[str, int], ...]:
    if geometry is None:
        return ()
    return (("hidden size", geometry.hidden), ("MLP width", geometry.mlp_width))


#: What needs which graph passes, and why: found by compiling without them with TPU-MLIR 1.30.2.
_NEEDS_PASSES = {
    "--dynamic": (
        ("rotary", "free-length"),
        "without, a launch at a prompt's own length ends the process or gives wrong numbers",
    ),
    "--num-device": (
        ("rotary", "split-attention"),
        "TPU-MLIR cannot split other graphs over several chips (it fails an assertion)",
    ),
}
#: Over so many devices TPU-MLIR 1.30.2 splits a layer, and matrices of more numbers than this.
DEVICES, SPLIT_FROM = (2, 4, 6, 8), 1 << 22


def refuse_unsplit(options: CompileOptions, geometry: Geometry | None) -> None:
    """Raise Usage where TPU-MLIR cannot split every layer over the devices: what it splits in part no demo
    can run, and what it repeats on every device is better off on one.
    """
    count = options.num_device
    if count not in DEVICES:
        raise Usage(f"--num-device {count}: TPU-MLIR splits over 2, 4, 6 or 8 devices, not over {count}")
    if options.mode == "int8":
        raise Usage(
            "--mode int8 does not go with --num-device: TPU-MLIR 1.30.2 cannot split its weights (it fails "
            "an assertion)",
            hint="use --mode int4 or bf16",
        )
    if geometry is None:
        return
    if geometry.kv_heads % count:
        raise Usage(
            f"--num-device {count} does not divide the {geometry.kv_heads} heads of keys and values: "
            "TPU-MLIR loses some where devices get different numbers of them"
        )
    for what, size in (
        ("MLP", geometry.hidden * geometry.mlp_width),
        ("table of tokens", geometry.hidden * geometry.vocab),
    ):
        if size <= SPLIT_FROM:
            raise Usage(
                f"this model is too small for --num-device: its {what} has {size:,} numbers a matrix, and "
                f"TPU-MLIR splits from {SPLIT_FROM:,} on",
                hint="leave --num-device out",
            )


def unsuited(options: CompileOptions) -> str:
    """What demos cannot do with a bmodel of these resolved options; empty when all of its runtime's can."""
    if options.addr_mode == "io_alone":
        return ""
    return (
        "--addr-mode basic does not suit LLM-TPU's chat.cpp: where nets share memory, "
        "penalty_sample_head's inputs lie over the logits, and from 2025-06 on the KV cache over "
        "everything; it suits sophon-demo's qwen.py, which has buffers of its own"
    )


def needed_passes(options: CompileOptions) -> tuple[str, ...]:
    """Passes that the runtime of resolved *options* needs beside those that always run."""
    return RUNTIMES[options.runtime or "llm-tpu"].passes


def refuse_uncleaned(options: CompileOptions, passes: tuple[str, ...]) -> None:
    """Raise :class:`Usage` for options that only work on nets that certain passes have been over, or not."""
    from graph_passes.framework import registry

    several = options.num_device > 1
    asked = {"--dynamic": options.dynamic, "--num-device": several}
    for option, (needed, why) in _NEEDS_PASSES.items():
        missing = [name for name in needed if name not in passes]
        clean = "qwen-surgery clean" + (" --multi-device" if several else "")
        if asked[option] and missing:
            raise Usage(
                f"{option} needs cleaned nets: {why}",
                hint=f"run `{clean}` on the export first, with the pass {' and '.join(missing)}",
            )
    hiding = [name for name in passes if name in registry.undivided()] if several else []
    if hiding:
        raise Usage(
            f"--num-device does not go with the pass {' and '.join(hiding)}: TPU-MLIR cannot split what it "
            "leaves",
            hint="run `qwen-surgery clean --multi-device` on a fresh export",
        )


def refuse_for_runtime(options: CompileOptions, passes: tuple[str, ...]) -> None:
    """Raise :class:`Usage` where the runtime needs a pass that the nets have not been through."""
    missing = [name for name in needed_passes(options) if name not in passes]
    if missing:
        raise Usage(
            f"--runtime {options.runtime} needs nets cleaned with the pass {' and '.join(missing)}: "
            "its demo writes masks of another float format",
            hint="run `qwen-surgery build --runtime`, or clean with a recipe that says "
            f"{missing[0]} = true under [passes]",
        )


def deploy_flags(kind: NetKind, options: CompileOptions, cores: int) -> list[str]:
    """``model_deploy``'s flags for a net of *kind*, without its files. *options* are resolved."""
    flags = _quantize_flags(kind, options)
    embedding = kind in (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE)
    if embedding or kind.per_layer:
        flags += ["--quant_input", "--quant_output"]
    elif kind in (NetKind.LM_HEAD, NetKind.LM_HEAD_TOPK):
        flags += ["--quant_input"]
    flags += ["--chip", options.target]
    heads = kind.chooses
    if options.num_device > 1 and not heads:
        flags += ["--num_device", str(options.num_device)]
    if cores > 1:
        flags += ["--num_core", str(cores)]
    own_length = options.dynamic and kind in (NetKind.EMBEDDING, NetKind.BLOCK)
    if own_length or kind is NetKind.SAMPLE_HEAD:
        # Not block_cache: it has one length, and compiled dynamic it gives wrong tokens. The generic demo's
        # sampling head always gets as many tokens as its penalty looks back on.
        flags += ["--dynamic"]
    if options.addr_mode == "io_alone" and kind is not NetKind.BLOCK:
        # Runtimes that share memory between nets would write one net's inputs over another's results. Only
        # the prefill blocks share: their tensors would take S x S bytes and more in every layer.
        flags += ["--addr_mode", "io_alone"]
    return flags


def _quantize_flags(kind: NetKind, options: CompileOptions) -> list[str]:
    if kind.chooses:
        return []
    if kind in (NetKind.EMBEDDING, NetKind.EMBEDDING_CACHE):
        return ["--quantize", QUANTIZE[options.float_mode]]
    mode = options.mode if kind.per_layer else options.lm_head_mode or options.mode
    flags = ["--quantize", QUANTIZE[mode]]
    if mode == "int4" or (kind.per_layer and options.q_group_size is not None):
        flags += ["--q_group_size", str(options.q_group_size)]
        if options.symmetric:
            flags += ["--q_symmetric"]
    return flags
