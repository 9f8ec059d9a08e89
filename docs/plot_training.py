"""Draw losses and scores over the steps of one or several consecutive trainings, as model cards show them.

python docs/plot_training.py curves.png runs/first/trainer_state.json runs/second/trainer_state.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from maskcls_hf.hub.curves import draw_curves


def joined(logs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One log, in which the steps of a training go on where those before it ended."""
    entries: list[dict[str, Any]] = []
    for log in logs:
        start = max((entry["step"] for entry in entries), default=0)
        entries += [entry | {"step": start + entry["step"]} for entry in log]
    return entries


if __name__ == "__main__":
    out, *states = map(Path, sys.argv[1:])
    if not draw_curves(joined([json.loads(state.read_text())["log_history"] for state in states]), out):
        sys.exit("There is nothing to draw, or matplotlib is missing.")
