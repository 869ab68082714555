"""Names of models: what people type, and the repository that they mean."""

from __future__ import annotations

from qwen_surgery import families
from qwen_surgery.errors import Usage
from qwen_surgery.parsing import is_plain_name

_ORGANISATION = "Qwen"


def repository(name: str) -> str:
    """``ORG/NAME`` as it is; a model's name alone is one of Qwen's own, however it is spelled.

    Raises Usage for a name alone that is no Qwen model's.
    """
    if "/" in name:
        parts = name.split("/")
        if len(parts) != 2 or not all(map(is_plain_name, parts)):
            raise Usage(f"{name:.100} is no repository", hint="say ORG/NAME")
        return name
    known = {_plain(one): one for family in families.all_families() for one in family.releases}
    found = known.get(_plain(name))
    if found is None and not name.lower().startswith("qwen"):
        raise Usage(f"{name} is no name of a Qwen model", hint="say ORG/NAME, or a name such as Qwen-7B-Chat")
    return f"{_ORGANISATION}/{found or name}"


def _plain(name: str) -> str:
    return name.lower().replace(".", "_")
