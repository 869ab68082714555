"""``python -m codemods.docs [FOLDER] [--check]``."""

from __future__ import annotations

import sys

from codemods.docs import main

sys.exit(main(sys.argv[1:]))
