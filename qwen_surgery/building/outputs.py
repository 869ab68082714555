"""The output folder of builds: which bmodels were made of what, what is unfinished, and who may work in it.

Under ``OUT/.build`` are ``store`` (the tasks' results), ``logs`` (one per task and per tool run),
``digests.json`` (what the checkpoint's tensors hold), ``finals.json`` (what each bmodel was made of) and
``unfinished.json`` (what builds have asked for that are not done). Deleting it only costs time.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen_surgery.building.graph import Store
from qwen_surgery.building.step import decode, encode
from qwen_surgery.building.step_assemble import Previous
from qwen_surgery.errors import Refused
from qwen_surgery.files import put, write_whole
from qwen_surgery.parsing import DATA_ERRORS

STATE = ".build"
SIDE = ".side.json"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Made:
    """A bmodel: its place under the output folder, the key of the task that made it, net -> signature, and
    the keys of all results behind it."""

    path: str
    key: str
    nets: dict[str, str]
    keys: tuple[str, ...]


class Outputs:
    """The folder *out*, as the build called *build* (among others into the same folder) sees it."""

    def __init__(self, out: Path, build: str) -> None:
        self.out = out.absolute()
        self.build = build
        self.state = self.out / STATE
        self.store = Store(self.state / "store")
        self.logs = self.state / "logs"
        self.digests = self.state / "digests.json"
        self._finals, self._unfinished = self.state / "finals.json", self.state / "unfinished.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder. Raises Refused when another build works in it."""
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    f"another build is running into {self.out}", hint="wait for it or choose another --out"
                ) from None
            yield

    def previous(self) -> dict[str, Previous]:
        """File name -> the bmodel that an earlier build made, where it is still in the store."""
        return {
            name: Previous(self.store.folder(made.key) / name, made.nets)
            for name, made in self._made.items()
            if self.store.has_outputs(made.key)
        }

    def want(self, keys: Iterable[str]) -> None:
        """This build asks for the results *keys*: until it is done, no other one retires them."""
        unfinished = self._wanted
        unfinished[self.build] = tuple(sorted({*unfinished.get(self.build, ()), *keys}))
        self.state.mkdir(parents=True, exist_ok=True)
        _write(self._unfinished, unfinished)

    def place(self, path: Path, key: str, nets: dict[str, str], keys: Iterable[str]) -> Path:
        """Give the bmodel of the task *key* its place, the relative *path*: another name for the store's
        file, or a copy where links are impossible. *keys* stay in the store as long as it is there."""
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in (path.name, path.name + SIDE):
            if (self.store.folder(key) / name).exists():
                put(self.store.folder(key) / name, target.with_name(name))
        made = Made(str(path), key, nets, tuple(sorted(keys)))
        _write(self._finals, {**self._made, path.name: made})
        return target

    def retire(self) -> None:
        """The build is done. Forget the results behind bmodels that are gone or were made anew."""
        finals = {name: made for name, made in self._made.items() if (self.out / made.path).exists()}
        unfinished = self._wanted
        unfinished.pop(self.build, None)
        _write(self._finals, finals)
        _write(self._unfinished, unfinished)
        kept = [*(made.keys for made in finals.values()), *unfinished.values()]
        self.store.retire(key for keys in kept for key in keys)

    @property
    def _made(self) -> dict[str, Made]:
        return _read(dict[str, Made], self._finals)

    @property
    def _wanted(self) -> dict[str, tuple[str, ...]]:
        return _read(dict[str, tuple[str, ...]], self._unfinished)


def _read(kind: type[dict[str, Value]], file: Path) -> dict[str, Value]:
    """The record in *file*; empty when that is missing or damaged."""
    try:
        found: dict[str, Value] = decode(kind, json.loads(file.read_text()))
    except (OSError, *DATA_ERRORS):
        return {}
    return found


def _write(file: Path, data: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(encode(data)).encode())
