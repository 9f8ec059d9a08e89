"""`python -m maskcls_hf.cli`: as `maskcls`, but with torch imported first, and so without a policy of waiting threads;
`python -m maskcls_command` is the same in all."""

from .main import app

app(prog_name="maskcls")
