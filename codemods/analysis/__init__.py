"""Readers of Python source: what a file says, without running it."""
