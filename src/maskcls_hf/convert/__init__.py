"""Checkpoints of other implementations -> ours, and back."""

from .maskformer import processor_to_transformers, save_as_transformers, to_transformers
from .original import from_original, save_from_original
from .per_pixel import from_per_pixel, processor_from_per_pixel, save_from_per_pixel

__all__ = [
    "from_original",
    "from_per_pixel",
    "processor_from_per_pixel",
    "processor_to_transformers",
    "save_as_transformers",
    "save_from_original",
    "save_from_per_pixel",
    "to_transformers",
]
