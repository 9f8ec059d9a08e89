"""What makes the classes of this package known to the Auto classes and pipelines of transformers."""

from .registration import register

__all__ = ["register"]
