"""Checkpoint weights: where each tensor lies, read from the shards' headers."""

from qwen_surgery.weights.index import WeightIndex
from qwen_surgery.weights.quantised import QuantisedRef, Release
from qwen_surgery.weights.refs import ITEM_SIZE, TensorRef

__all__ = ["ITEM_SIZE", "QuantisedRef", "Release", "TensorRef", "WeightIndex"]
