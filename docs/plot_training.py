"""Draw losses and scores over the steps of one or several consecutive Trainer runs.

python docs/plot_training.py curves.png runs/first/trainer_state.json runs/second/trainer_state.json
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt


def main(out: Path, states: list[Path]) -> None:
    figure, (losses, scores) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    start = 0
    for number, state in enumerate(states):
        log = json.loads(state.read_text())["log_history"]
        for axis, names in ((losses, ("loss", "eval_loss")), (scores, ("eval_mean_iou", "eval_iou_nucleus"))):
            for color, name in enumerate(names):
                points = [(start + entry["step"], entry[name]) for entry in log if name in entry]
                label = name.replace("_", " ") if number == 0 else None
                axis.plot(
                    *zip(*points, strict=True), color=f"C{color}", marker="." if len(points) < 20 else "", label=label
                )
        start += max(entry["step"] for entry in log)
        if number < len(states) - 1:
            losses.axvline(start, color="0.8")
            scores.axvline(start, color="0.8")
    for axis in (losses, scores):
        axis.set_xlabel("step")
        axis.legend()
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
