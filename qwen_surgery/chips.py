"""The chips a bmodel can be for: one row each, and everything that depends on the chip reads it here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What one chip and its boards can do.

    ``cores``: one bmodel is made for each of these core counts. ``several_devices``: boards with more than
    one such chip exist and may share a model. ``dynamic``: prefill at each prompt's own length. ``heads``:
    the bmodel has greedy_head and a head to sample by. ``runtimes``: the vendor runtimes that run on it, the
    preferred first. ``emulators``: the library of TPU-MLIR's emulator, by its naming (newer, 1.6).
    ``in_file_name`` says whether a bmodel's name tells the chip; ``tags_addresses``, whether TPU-MLIR gives
    its nets tags in place of addresses unless told otherwise.
    """

    name: str
    cores: tuple[int, ...]
    several_devices: bool
    dynamic: bool
    heads: bool
    runtimes: tuple[str, ...]
    emulators: tuple[str, ...]
    in_file_name: bool = True
    tags_addresses: bool = False


_ROWS = (
    Chip(
        name="bm1684x",
        cores=(1,),
        several_devices=True,
        dynamic=True,
        heads=True,
        runtimes=("llm-tpu", "sophon-demo", "sophon-demo-2024.1", "llm-tpu-generic"),
        emulators=("libcmodel_bm1684x.so", "libcmodel_1684x.so"),
        in_file_name=False,  # the vendor's guide and demos call its files without
    ),
    Chip(
        name="bm1688",
        cores=(1, 2),
        several_devices=False,
        dynamic=False,
        heads=False,
        runtimes=("sophon-demo",),
        emulators=("libcmodel_bm1688.so", "libcmodel_1688.so"),
        tags_addresses=True,
    ),
    Chip(
        name="cv186x",
        cores=(1,),
        several_devices=False,
        dynamic=False,
        heads=False,
        runtimes=("sophon-demo",),
        emulators=("libcmodel_bm1688.so", "libcmodel_1688.so"),  # the same core
        tags_addresses=True,
    ),
)
CHIPS = {chip.name: chip for chip in _ROWS}
DEFAULT_CHIP = _ROWS[0].name


def with_ability(ability: str) -> str:
    """The names of the chips that have *ability* (a field of :class:`Chip` that is true), for a message."""
    return ", ".join(chip.name for chip in _ROWS if getattr(chip, ability))
