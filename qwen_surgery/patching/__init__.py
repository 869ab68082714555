"""Patching a checkout: plan the edits, write them atomically, undo them, survey many revisions."""
