"""Pictures of segments, for people."""

from .drawing import Colour, draw_overlay, segment_colours

__all__ = ["Colour", "draw_overlay", "segment_colours"]
