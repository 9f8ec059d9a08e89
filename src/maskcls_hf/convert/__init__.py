"""Checkpoints of other implementations -> ours, and back."""

from .maskformer import processor_to_transformers, save_as_transformers, to_transformers
from .original import from_original, save_from_original

__all__ = [
    "from_original",
    "processor_to_transformers",
    "save_as_transformers",
    "save_from_original",
    "to_transformers",
]
