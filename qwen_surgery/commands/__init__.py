"""One click command per file, named like the command; loaded on demand by :mod:`qwen_surgery.cli`."""
