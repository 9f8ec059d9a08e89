"""Every stage beside transformers' MaskFormer, in one run on one machine:  python benchmarks/speed.py

Prints a table, and writes it as results.json and .png. Where there is a GPU, stages are timed on it, with torch's own
settings (convolutions in TF32), and the files are results_gpu.json and .png. `--busy 2` times each stage again while
two other processes keep a core busy each, as loader workers or other users do.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from measuring import MEGABYTE, argument_parser, machine, medians, neighbors, peak_memory, read_arguments, write_record
from rich.console import Console
from rich.table import Table
from stages import DEVICE, GROUPS, Stage
from transformers.utils import logging

ROUNDS_WHEN_BUSY = 3


def measure(stage: Stage, rounds: int, busy: int) -> dict[str, Any]:
    seconds = medians(stage.contenders, rounds)  # before the memory: what is set up once for all is then there
    calls = stage.contenders.items()
    memory = {name: stage.apart(name) if stage.apart else peak_memory(call, stage.device) for name, call in calls}
    ratio_wanted, memory_ratio_wanted = stage.wanted
    result = {
        "stage": stage.name,
        "note": stage.note,
        "seconds": seconds,
        "peak_memory": memory,
        "ratio": ratio(seconds),
        "ratio_wanted": ratio_wanted,
        "memory_ratio": None if None in memory.values() else ratio(memory),
        "memory_ratio_wanted": memory_ratio_wanted,
    }
    if busy:
        with neighbors(busy):
            when_busy = medians(stage.contenders, min(rounds, ROUNDS_WHEN_BUSY))
        slowdown = when_busy["maskcls_hf"] / seconds["maskcls_hf"]
        result |= {"busy_seconds": when_busy, "busy_ratio": ratio(when_busy), "busy_slowdown": slowdown}
    return result


def ratio(costs: dict[str, Any]) -> float:
    """How many times ours transformers' is."""
    theirs, ours = costs.values()
    return theirs / max(ours, 1e-9 if isinstance(ours, float) else 1)


def table_of(results: list[dict[str, Any]], title: str, busy: int) -> Table:
    table = Table(title=title)
    table.add_column("stage")
    headings = ["transformers", "maskcls_hf", "ratio", "wanted", "memory", "ours", "ratio", "wanted"]
    if busy:
        headings += [f"{busy} busy: transformers", "maskcls_hf", "ratio", "times quiet"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        memory = result["peak_memory"].values()
        cells = [
            *map(milliseconds, result["seconds"].values()),
            marked(result["ratio"], result["ratio_wanted"]),
            "" if result["ratio_wanted"] is None else f"{result['ratio_wanted']:g}",
            *("" if size is None else f"{size / MEGABYTE:.0f} MB" for size in memory),
            marked(result["memory_ratio"], result["memory_ratio_wanted"]),
            "" if result["memory_ratio_wanted"] is None else f"{result['memory_ratio_wanted']:.3g}",
        ]
        if busy:
            cells += [
                *map(milliseconds, result["busy_seconds"].values()),
                marked(result["busy_ratio"], result["ratio"] / 2),
                marked(-result["busy_slowdown"], -3).replace("-", ""),
            ]
        table.add_row(result["stage"], *cells)
    return table


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds > 0.02 else f"{1000 * seconds:.2g} ms"


def marked(ratio: float | None, wanted: float | None) -> str:
    """With a color where it is short of what is wanted."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}" if wanted is None or ratio >= wanted else f"[bold red]{ratio:.2f}[/]"


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    names, ratios = [result["stage"] for result in results], [result["ratio"] for result in results]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(names) + 1.2), layout="constrained")
    colors = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    axes.barh(names, [ratio - 1 for ratio in ratios], left=1, color=colors)
    for row, result in enumerate(results):
        axes.text(1.02, row, f"{result['ratio']:.1f}", va="center", transform=axes.get_yaxis_transform())
        if result["ratio_wanted"] is not None:
            axes.plot([result["ratio_wanted"]] * 2, [row - 0.4, row + 0.4], color="black")
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("times as fast as transformers (black: target; orange: slower)")
    axes.set_title(title.replace("; ", "\n", 1), fontsize=8)
    axes.margins(x=0.05, y=0.02)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main(
    description: str | None = __doc__,
    groups: dict[str, Callable[[], Iterator[Stage]]] = GROUPS,
    name: str = "results",
    rounds: int = 7,
) -> None:
    name = name if DEVICE == "cpu" else f"{name}_gpu"
    parser = argument_parser(description, rounds=rounds, name=name)
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="also time beside N busy processes")
    parser.add_argument("--redraw", action="store_true", help=f"measure nothing, draw {name}.json anew")
    arguments = read_arguments(parser, groups)
    if arguments.redraw:
        record = json.loads((arguments.out / f"{name}.json").read_text())
        plot(record["results"], record["machine"], arguments.out / f"{name}.png")
        return
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    title, console, results, failed = machine(), Console(width=190 if arguments.busy else 150), [], []
    with console.status("") as status:
        for group in arguments.only:
            status.update(f"{group}: making inputs")
            try:
                for stage in groups[group]():
                    status.update(stage.name)
                    results.append(measure(stage, arguments.rounds, arguments.busy))
                    console.print(f"{stage.name}: {results[-1]['ratio']:.2f}")
                    write_record(arguments.out / f"{name}.json", title, arguments.rounds, results)
            except Exception:  # the other groups are measured all the same
                failed.append(group)
                console.print(traceback.format_exc(), markup=False, highlight=False)
    console.print(table_of(results, title, arguments.busy))
    if results:
        plot(results, title, arguments.out / f"{name}.png")
    if failed:
        sys.exit(f"These did not run to their end: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
