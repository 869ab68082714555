"""Readers of a parsed modeling file: they answer questions about it and change nothing."""
