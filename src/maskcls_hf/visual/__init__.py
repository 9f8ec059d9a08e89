"""What people see: pictures of segments, and names as text."""

from .drawing import Color, draw_overlay, segment_colors

__all__ = ["Color", "draw_overlay", "segment_colors"]
