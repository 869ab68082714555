"""Verification: every stage against the unpatched upstream model."""
