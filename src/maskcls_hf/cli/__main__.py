"""`python -m maskcls_hf.cli`: as `maskcls`, but without a policy of waiting threads, as torch is imported first.

`python -m maskcls_command` is the same as `maskcls` in all.
"""

from .main import app

app(prog_name="maskcls")
