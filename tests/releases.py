"""Quantised releases for tests, with the integers that are to be found in them again."""

from __future__ import annotations

from pathlib import Path

from golden.eras.checkout import read_safetensors
from golden.releases import Rounded, Scheme, quantise_checkout, rounded


def quantised(checkout: Path, scheme: Scheme) -> dict[str, Rounded]:
    """Make *checkout* a release quantised by *scheme*; the integers of its layers' matrices by name."""
    weights = {
        name: values
        for shard in checkout.glob("*.safetensors")
        for name, values in read_safetensors(shard).items()
        if ".h." in name and values.ndim == 2
    }
    quantise_checkout(checkout, scheme)
    return {name: rounded(values, scheme) for name, values in weights.items()}
