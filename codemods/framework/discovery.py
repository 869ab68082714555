"""Finding what a package defines: one class per module, named like its file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def modules(package: str, path: Iterable[str]) -> dict[str, str]:
    """Name (``scalar-divide``) to module (``codemods.scalar_divide``), sorted. Nothing is imported."""
    found = sorted(module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    return {name.replace("_", "-"): f"{package}.{name}" for name in found}


def defined(module: str, base: type[T]) -> T | None:
    """An instance of the subclass of ``base`` that ``module`` itself defines; None when it defines none that
    is whole."""
    loaded = importlib.import_module(module)
    for value in vars(loaded).values():
        own = isinstance(value, type) and value.__module__ == loaded.__name__
        if own and issubclass(value, base) and value is not base and not inspect.isabstract(value):
            return value()
    return None
