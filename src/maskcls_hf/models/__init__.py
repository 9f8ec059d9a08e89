"""What travels with a checkpoint: it lies flat here, and its files reach each other by `from .name import x` only."""
