"""Writing whole files or none, text that is safe to show, and quiet."""
