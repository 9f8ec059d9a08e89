"""How time and memory of this package grow, one quantity at a time:  python benchmarks/growth.py

Prints a table with the growth of each line: the exponent of its upper half, 1 where it is linear, 0 where it stays.
Writes growth.json and growth.png; with --redraw only growth.png, of what growth.json holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from examples import GRID, PADDED, VALID, blobs, outputs, predictions
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from measuring import MEGABYTE, argument_parser, machine, medians, peak_memory, read_arguments, write_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

from maskcls_hf import MaskClsConfig, MaskClsImageProcessor
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP
from maskcls_hf.models.losses import MaskClsCriterion
from maskcls_hf.models.transformer_decoders import SegmentLogits


@dataclass(frozen=True)
class Case:
    megapixels: float = 2.0  # of the map, or of the image that is trained on
    queries: int = 100
    labels: int = 133
    segments: int = 40
    batch: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """16:9."""
        height = round((self.megapixels * 1e6 * 9 / 16) ** 0.5)
        return height, round(height * 16 / 9)


SWEEPS: dict[str, tuple[Case, list[float]]] = {
    "megapixels": (Case(), [0.25, 0.5, 1, 2, 4, 8, 16, 32]),
    "queries": (Case(segments=20), [20, 50, 100, 200, 500, 1000]),
    "labels": (Case(), [2, 10, 50, 150, 400, 1000]),
    "segments": (Case(queries=300), [1, 3, 10, 30, 100, 300]),
    "batch": (Case(), [1, 2, 4, 8, 16]),
}
MARKERS = "os^D"  # one a line
TRAINED_ON = Case(megapixels=0.25, segments=16)  # what the criterion is timed at, but for the quantity of the sweep
TRAINED_UP_TO = 4.0  # megapixels


def make_map(task: str, case: Case) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    pair = predictions(GRID, case.queries, case.labels, case.segments, rng)
    results = outputs(pair, PADDED, VALID)
    for name, value in vars(results).items():
        setattr(results, name, value.expand(case.batch, *value.shape[1:]))
    fuse = {"label_ids_to_fuse": set(range(case.labels // 2, case.labels))} if task == "panoptic" else {}
    post_process = getattr(MaskClsImageProcessor(inference_defaults=NO_CLEAN_UP), f"post_process_{task}_segmentation")
    return lambda: post_process(results, target_sizes=[case.size] * case.batch, **fuse)


def make_loss(case: Case) -> Callable[[], Any]:
    """Forward and backward of one layer."""
    rng = np.random.default_rng(0)
    config = MaskClsConfig(num_labels=case.labels, num_queries=case.queries)
    criterion = MaskClsCriterion(config)
    masks = torch.from_numpy(blobs(case.size, case.segments, rng)).int()
    labels = torch.from_numpy(rng.integers(0, case.labels, case.segments))
    grid = (case.size[0] // 4, case.size[1] // 4)
    pair = predictions(grid, case.queries, case.labels, case.segments, rng)
    layer = SegmentLogits(*(logits.expand(case.batch, *logits.shape).clone().requires_grad_() for logits in pair))
    return lambda: criterion.total(criterion([layer], [masks] * case.batch, [labels] * case.batch)).backward()


LINES: dict[str, Callable[[Case], Callable[[], Any]]] = {
    "semantic map": partial(make_map, "semantic"),
    "panoptic map": partial(make_map, "panoptic"),
    "instance segments": partial(make_map, "instance"),
    "criterion": make_loss,
}


def cases(quantity: str, line: str) -> list[tuple[float, Case]]:
    case, values = SWEEPS[quantity]
    if line == "criterion":
        case = replace(TRAINED_ON, queries=max(case.queries, TRAINED_ON.queries))
        values = [value for value in values if quantity != "megapixels" or value <= TRAINED_UP_TO]
    return [(value, replace(case, **{quantity: value})) for value in values]


def growth(values: list[float], costs: list[float]) -> float:
    """Exponent of the upper half of a line."""
    half = len(values) // 2
    return float(np.polyfit(np.log(values[half:]), np.log(costs[half:]), 1)[0])


def measure(quantity: str, line: str, rounds: int) -> dict[str, Any]:
    values, seconds, memory = [], [], []
    for value, case in cases(quantity, line):
        values.append(value)
        call = LINES[line](case)
        seconds.append(medians({line: call}, rounds)[line])
        memory.append(peak_memory(call))
    result = {"quantity": quantity, "line": line, "values": values, "seconds": seconds, "peak_memory": memory}
    result["growth_of_time"] = growth(values, seconds)
    result["growth_of_memory"] = None if None in memory else growth(values, [max(size, 1) for size in memory])
    return result


def table_of(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for heading in ("quantity", "of", "values", "milliseconds", "growth", "MB", "growth"):
        table.add_column(heading, justify="left" if heading in ("quantity", "of") else "right")
    for result in results:
        memory, growth_of_memory = result["peak_memory"], result["growth_of_memory"]
        table.add_row(
            result["quantity"],
            result["line"],
            " ".join(f"{value:g}" for value in result["values"]),
            " ".join(f"{1000 * value:.0f}" for value in result["seconds"]),
            f"{result['growth_of_time']:.2f}",
            "" if growth_of_memory is None else " ".join(f"{value / MEGABYTE:.0f}" for value in memory),
            "" if growth_of_memory is None else f"{growth_of_memory:.2f}",
        )
    return table


TITLES = {
    "megapixels": ("megapixels of the map", "megapixels"),
    "queries": ("queries", "queries"),
    "labels": ("classes", "classes"),
    "segments": ("segments in the image", "segments"),
    "batch": ("images in a batch", "images"),
}
COSTS = {"seconds": ("time", "ms", 1e-3), "peak_memory": ("memory", "MB at the peak", MEGABYTE)}


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """A row a quantity; the scales of a column are the same, so that its panels can be compared."""
    quantities = list(dict.fromkeys(result["quantity"] for result in results))
    shape = {"figsize": (8, 2.3 * len(quantities) + 0.8), "sharey": "col", "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(quantities), len(COSTS), **shape)
    letters = iter("abcdefghijklmnop")
    for row, quantity in enumerate(quantities):
        heading, unit = TITLES[quantity]
        for axis, (cost, (name, label, scale)) in zip(axes[row], COSTS.items(), strict=True):
            for number, line in enumerate(LINES):
                for result in results:
                    if (result["quantity"], result["line"]) == (quantity, line) and None not in result[cost]:
                        costs = [value / scale for value in result[cost]]
                        axis.plot(result["values"], costs, f"C{number}{MARKERS[number]}-", markersize=4, label=line)
            axis.set(xscale="log", yscale="log", xlabel=heading, ylabel=label)
            axis.set_title(f"({next(letters)}) {name} by {unit}", loc="left", fontsize=10)
            axis.set_xticks(SWEEPS[quantity][1], minor=False)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
            for direction in (axis.xaxis, axis.yaxis):
                direction.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.tick_params(labelleft=True)
            axis.grid(alpha=0.3)
    handles = {label: handle for handle, label in zip(*axes[0, 0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel(title, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argument_parser(__doc__, rounds=3, name="growth")
    parser.add_argument("--redraw", action="store_true", help="measure nothing, draw growth.json anew")
    arguments = read_arguments(parser, SWEEPS)
    if arguments.redraw:
        record = json.loads((arguments.out / "growth.json").read_text())
        plot(record["results"], record["machine"], arguments.out / "growth.png")
        return
    pairs = [(quantity, line) for quantity in arguments.only for line in LINES]
    results = [measure(*pair, arguments.rounds) for pair in track(pairs, "measuring")]
    title = machine()
    Console(width=170).print(table_of(results, title))
    write_record(arguments.out / "growth.json", title, arguments.rounds, results)
    plot(results, title, arguments.out / "growth.png")


if __name__ == "__main__":
    main()
