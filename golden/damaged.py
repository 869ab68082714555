"""Record files that may have been edited or cut: whatever is wrong with one is a ValueError that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DamagedRecords(ValueError):
    """A file of records does not hold what it should."""


@contextmanager
def reading(path: Path, says: str) -> Iterator[None]:
    """Turn whatever data raises inside the block into :class:`DamagedRecords`: ``PATH SAYS: reason``."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedRecords(f"{path} {says}: {type(error).__name__}: {error!s:.200}") from error


def require(what: object, kinds: type | tuple[type, ...], *values: object) -> None:
    """Raise TypeError when one of *values*, from the record *what*, is of none of *kinds*."""
    for value in values:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{what!s:.100} holds {value!r:.100}")
