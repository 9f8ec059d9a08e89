"""`python -m maskcls_hf.cli`, the same as `maskcls`."""

from .main import app

app(prog_name="maskcls")
