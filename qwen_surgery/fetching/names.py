"""Names of models: what people type, and the repository that they mean."""

from __future__ import annotations

from itertools import product

from qwen_surgery.errors import Usage
from qwen_surgery.parsing import is_plain_name

_ORGANISATION = "Qwen"
#: Qwen v1 as its makers spell it: sizes, and what follows them.
_NAMES = tuple(
    f"Qwen-{size}{kind}"
    for size, kind in product(("1_8B", "7B", "14B", "72B"), ("", "-Chat", "-Chat-Int4", "-Chat-Int8"))
)


def repository(name: str) -> str:
    """``ORG/NAME`` as it is; a model's name alone is one of Qwen's own, however it is spelled.

    Raises Usage for a name alone that is no Qwen model's.
    """
    if "/" in name:
        parts = name.split("/")
        if len(parts) != 2 or not all(map(is_plain_name, parts)):
            raise Usage(f"{name:.100} is no repository", hint="say ORG/NAME")
        return name
    known = {_plain(one): one for one in _NAMES}
    found = known.get(_plain(name))
    if found is None and not name.lower().startswith("qwen"):
        raise Usage(f"{name} is no name of a Qwen model", hint="say ORG/NAME, or a name such as Qwen-7B-Chat")
    return f"{_ORGANISATION}/{found or name}"


def _plain(name: str) -> str:
    return name.lower().replace(".", "_")
