"""Import a checkout's Python as a private package, from bytes.

A checkout's modeling code was written for the transformers of its day. Later releases dropped names it
imports (mostly for chatting, streaming and docstrings, which an export never uses) and methods its model
class calls. Inside the private package, and nowhere else, imports of such names are answered with stand-ins;
the installed transformers is not touched. Nothing is fetched and nothing is written.

A layer needs no transformers at all, only torch. With ``installed=False`` every transformers name is a
stand-in, so that an export neither waits for that import nor depends on its version.

Code that is part of transformers reaches the rest of it by relative imports. It has a *home*, the package it
is a module of: what is not among the files is imported from there.

Importing runs the code: callers ask for ``--trust-remote-code`` first (:func:`require_trust`).
"""

from __future__ import annotations

import builtins
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_surgery.errors import Refused, Usage

_serial = itertools.count()

# Packages that some forks import and that only serve training, serving or registration there.
_OPTIONAL = ("modelscope", "transformers_stream_generator", "flash_attn", "deepspeed", "kernels")
# Decorators that only edit docstrings; newer transformers dropped them.
_DOC_DECORATORS = (
    "add_start_docstrings",
    "add_start_docstrings_to_model_forward",
    "add_code_sample_docstrings",
    "add_end_docstrings",
    "replace_return_docstrings",
)


# What a model's forward returns, by the first words of the class's name.
_OUTPUTS = ("BaseModelOutput", "CausalLMOutput")


def require_trust(trust_remote_code: bool, what: str, *, lent: bool = False) -> None:
    """Raise Usage unless the user allowed running the checkout's Python, or the code is *lent* to it by an
    installed package."""
    if not (trust_remote_code or lent):
        raise Usage(
            f"{what} runs the Python files of the checkout",
            hint="read them, then allow it with --trust-remote-code",
        )


def load(
    sources: Mapping[str, bytes], name: str = "modeling_qwen", *, installed: bool = True, home: str = ""
) -> types.ModuleType:
    """Import module *name* out of *sources* (file name -> content) as a fresh private package.

    Every call gives a package of its own, so patched and unpatched code can live side by side. Relative
    imports between the files work, and others where there is a *home*. *installed* says whether the code gets
    the installed transformers. Raises Refused, with the file, when the code cannot be imported.
    """
    package = f"_qwen_surgery_checkout_{next(_serial)}"
    files = {
        path[:-3]: content for path, content in sources.items() if path.endswith(".py") and "/" not in path
    }
    if name not in files:
        raise Refused(f"the checkout has no {name}.py")
    importer: Any = _import if installed else _import_without_transformers
    # transformers reads from a file's path which of its models it is
    folder = "/".join((f"<{package}>", *home.split("."))) if home else f"<{package}>"
    finder = _Finder(package, folder, files, _at_home(home, files, importer) if home else importer)
    sys.meta_path.insert(0, finder)
    try:
        loaded = importlib.import_module(f"{package}.{name}")
        if home:
            loaded.__file__ = _file_at(home, name)
        return loaded
    except Refused:
        raise
    except Exception as error:
        for module in [m for m in sys.modules if m == package or m.startswith(package + ".")]:
            del sys.modules[module]
        raise Refused(
            f"{name}.py cannot be imported: {type(error).__name__}: {error}",
            hint="--debug shows where",
        ) from error
    finally:
        # Late relative imports inside functions still need the finder, so it moves behind the usual ones.
        sys.meta_path.remove(finder)
        sys.meta_path.append(finder)


class _Finder:
    """Finds the modules of one private package in memory."""

    def __init__(self, package: str, folder: str, files: Mapping[str, bytes], importer: Any) -> None:
        self._package = package
        self._folder = folder
        self._files = files
        self._importer = importer

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname == self._package:
            spec = importlib.machinery.ModuleSpec(
                fullname, _Loader(b"", fullname, self._importer), is_package=True
            )
            spec.submodule_search_locations = []
            return spec
        parent, _, stem = fullname.rpartition(".")
        if parent != self._package or stem not in self._files:
            return None
        origin = f"{self._folder}/{stem}.py"
        spec = importlib.machinery.ModuleSpec(
            fullname, _Loader(self._files[stem], origin, self._importer), origin=origin
        )
        spec.has_location = True
        return spec


class _Loader(importlib.abc.Loader):
    """Runs one in-memory file with its own ``__import__``."""

    def __init__(self, content: bytes, origin: str, importer: Any) -> None:
        self._content = content
        self._origin = origin
        self._importer = importer

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        private = dict(vars(builtins))
        private["__import__"] = self._importer
        module.__dict__["__builtins__"] = private
        exec(compile(self._content, self._origin, "exec", dont_inherit=True), module.__dict__)

    def get_source(self, fullname: str) -> str:
        """Lets tracebacks and ``inspect`` show the lines."""
        return importlib.util.decode_source(self._content)


def _at_home(home: str, files: Mapping[str, bytes], importer: Any) -> Any:
    """*importer* for a module of the package *home*, of which only *files* are private."""

    def at_home(
        name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0
    ) -> types.ModuleType:
        if not level or (level == 1 and name in files):
            return importer(name, globals_, locals_, fromlist, level)
        return importlib.import_module(importlib.util.resolve_name("." * level + name, home))

    return at_home


def _file_at(home: str, name: str) -> str:
    """The file of module *name* of the package *home*: some releases open it to see how it attends."""
    spec = importlib.util.find_spec(home)
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).with_name(f"{name}.py"))


def _import(
    name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0
) -> types.ModuleType:
    """``__import__`` of the private package: the real one, with stand-ins for what is gone."""
    root = name.partition(".")[0]
    if level or root not in ("transformers", *_OPTIONAL):
        return builtins.__import__(name, globals_, locals_, fromlist, level)
    if root == "flash_attn":
        raise ImportError("flash_attn is never used here: it needs a GPU and cannot be exported")
    if root in _OPTIONAL:
        return _OptionalPackage(name if fromlist else root)
    try:
        module = builtins.__import__(name, globals_, locals_, fromlist, level)
    except ImportError:
        if not fromlist:
            raise
        module = types.ModuleType(name)
    if not fromlist or "*" in fromlist:
        return module
    result = types.ModuleType(name)
    for attribute in fromlist:
        setattr(result, attribute, _transformers_attribute(module, name, attribute))
    return result


def _import_without_transformers(
    name: str, globals_: Any = None, locals_: Any = None, fromlist: Any = (), level: int = 0
) -> types.ModuleType:
    """``__import__`` of a private package that runs without transformers."""
    root = name.partition(".")[0]
    if level or root != "transformers":
        return _import(name, globals_, locals_, fromlist, level)
    return _OptionalPackage(name if fromlist else root)


def _transformers_attribute(module: types.ModuleType, name: str, attribute: str) -> Any:
    try:
        found = getattr(module, attribute)
    except (AttributeError, ImportError):
        found = _stand_in(name, attribute)
    if attribute == "PreTrainedModel" and isinstance(found, type):
        return _pretrained_model(found)
    return found


def _pretrained_model(base: type) -> type:
    """*base* plus what upstream's model class calls and later transformers no longer has."""
    if hasattr(base, "get_head_mask"):
        return base

    def get_head_mask(self: Any, head_mask: Any, num_hidden_layers: int, *_: Any) -> list[None]:
        if head_mask is not None:
            raise NotImplementedError("head_mask is not supported")
        return [None] * num_hidden_layers

    return type("PreTrainedModel", (base,), {"get_head_mask": get_head_mask, "__module__": base.__module__})


def _stand_in(module: str, name: str) -> Any:
    """What an import of a missing *name* gives: importable and subclassable, but not usable."""
    if name in _DOC_DECORATORS:
        return lambda *args, **kwargs: lambda function: function

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{module}.{name} is not in the installed packages")

    if name.startswith("is_") and name.endswith("_available"):
        return lambda *args, **kwargs: False
    return type(name, (), {"__init__": refuse, "__module__": module})


class _OptionalPackage(types.ModuleType):
    """Stands for a package that is not needed: every name imported from it is a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "get_logger":
            return lambda *args, **kwargs: _Logger(self.__name__)
        if name in ("logging", "utils"):
            return _OptionalPackage(f"{self.__name__}.{name}")
        if name in ("PretrainedConfig", "PreTrainedConfig"):
            return _Config
        if name in ("PreTrainedModel", "ModelOutput") or name.startswith(_OUTPUTS):
            from qwen_surgery.exporting import stand_ins

            return stand_ins.Model if name == "PreTrainedModel" else stand_ins.Output
        return _stand_in(self.__name__, name)


class _Logger(logging.LoggerAdapter[logging.Logger]):
    """A logger with the methods that transformers adds to Python's."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def warning_once(self, *args: Any, **kwargs: Any) -> None:
        self.warning(*args, **kwargs)

    def warning_advice(self, *args: Any, **kwargs: Any) -> None:
        self.warning(*args, **kwargs)


class _Config:
    """What a checkout's configuration class needs of its base: keyword arguments become attributes.

    ``attribute_map`` (new name -> the name it is stored under) works as in transformers.
    """

    attribute_map: Mapping[str, str] = {}
    output_attentions = output_hidden_states = False
    use_return_dict = return_dict = True

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(type(self).attribute_map.get(name, name), value)

    def __getattr__(self, name: str) -> Any:
        stored = type(self).attribute_map.get(name)
        if stored is None:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self, stored)
