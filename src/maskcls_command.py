"""The console script `maskcls`: what has to happen before torch is imported.

It lies beside the package because `import maskcls_hf` registers with transformers, whose import takes seconds; help and
wrong calls need none of it.
"""

import os
import sys

# How the threads of OpenMP wait. By default they spin, and with other busy processes on the machine each takes the core
# that the one it waits for needs: a map takes 40 times as long. Read once, when torch loads its OpenMP.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")

parsing = False  # while it is true, importing maskcls_hf registers nothing: a command does when it runs


def main() -> None:
    """Run `maskcls` with the arguments of the process; worker processes inherit its environment."""
    global parsing
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        parsing = True
        from maskcls_hf.cli.main import app

        parsing = False
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        sys.exit(130)
    app(prog_name="maskcls")


if __name__ == "__main__":  # python -m maskcls_command, accelerate launch -m maskcls_command
    import maskcls_command

    maskcls_command.main()
