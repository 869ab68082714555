"""Verification: every stage of the road against the unpatched upstream model."""
