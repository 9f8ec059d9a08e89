"""What people see: pictures of segments, and names as text."""

from .drawing import Colour, draw_overlay, segment_colours

__all__ = ["Colour", "draw_overlay", "segment_colours"]
