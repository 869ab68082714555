"""Mutated input files for every parser: each ends in a value or in one of the program's own errors."""
