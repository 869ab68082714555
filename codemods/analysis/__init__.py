"""Readers of Python source: what a file says, without running it, and what may be changed in it."""
