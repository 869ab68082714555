"""Each rule as an ordinary LibCST command, ``<RuleClass>Command`` in the rule's own module.

``python -m libcst.tool codemod [-x] codemods.disable_torch2.DisableTorch2Command FILE`` looks the class up
by that name: with ``-x`` as it stands, otherwise below the packages that ``.libcst.codemod.yaml`` lists, this
one among them. LibCST's codemod package takes longer to import than a whole patch run, so this package is
imported only where LibCST's tool runs (see ``codemods/__init__.py``).
"""

from __future__ import annotations

import sys

from codemods.framework import registry
from codemods.libcst_commands.command import command

sys.modules[f"{__name__}.codemods"] = sys.modules["codemods"]
for _name, _module in registry.BUILTIN.items():
    _rule = registry.get(_name)
    _home = sys.modules[f"{__name__}.{_module}"] = sys.modules[_module]
    setattr(_home, f"{type(_rule).__name__}Command", command(_rule))
