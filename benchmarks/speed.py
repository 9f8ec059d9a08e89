"""Every stage beside transformers' MaskFormer, in one run on one machine:  python benchmarks/speed.py

Prints a table, and writes it as results.json and results.png. Stages are timed on a GPU where there is one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from measuring import MEGABYTE, machine, medians, peak_memory, read_arguments, write_record
from rich.console import Console
from rich.table import Table
from stages import GROUPS, Stage
from transformers.utils import logging


def measure(stage: Stage, rounds: int) -> dict[str, Any]:
    seconds = medians(stage.contenders, rounds)  # before the memory: what is set up once for all is then there
    memory = {name: peak_memory(call) for name, call in stage.contenders.items()}
    theirs, ours = stage.contenders
    result = {
        "stage": stage.name,
        "note": stage.note,
        "seconds": seconds,
        "peak_memory": memory,
        "ratio": seconds[theirs] / seconds[ours],
        "ratio_wanted": stage.ratio,
        "memory_ratio": None,
        "memory_ratio_wanted": stage.memory_ratio,
    }
    if memory[theirs] is not None and memory[ours] is not None:
        result["memory_ratio"] = memory[theirs] / max(memory[ours], 1)
    return result


def table_of(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    table.add_column("stage")
    for heading in ("transformers", "maskcls_hf", "ratio", "wanted", "memory", "ours", "ratio", "wanted"):
        table.add_column(heading, justify="right")
    for result in results:
        (theirs, ours), memory = result["seconds"].values(), list(result["peak_memory"].values())
        table.add_row(
            result["stage"],
            f"{1000 * theirs:.0f} ms",
            f"{1000 * ours:.0f} ms",
            marked(result["ratio"], result["ratio_wanted"]),
            "" if result["ratio_wanted"] is None else f"{result['ratio_wanted']:g}",
            *("" if size is None else f"{size / MEGABYTE:.0f} MB" for size in memory),
            marked(result["memory_ratio"], result["memory_ratio_wanted"]),
            "" if result["memory_ratio_wanted"] is None else f"{result['memory_ratio_wanted']:.3g}",
        )
    return table


def marked(ratio: float | None, wanted: float | None) -> str:
    """With a colour where it is short of what is wanted."""
    if ratio is None:
        return ""
    return f"{ratio:.1f}" if wanted is None or ratio >= wanted else f"[bold red]{ratio:.2f}[/]"


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    names = [result["stage"] for result in results]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(names) + 1.2), layout="constrained")
    axes.barh(names, [result["ratio"] for result in results], color="tab:blue")
    for row, result in enumerate(results):
        axes.text(result["ratio"], row, f" {result['ratio']:.1f}", va="center")
        if result["ratio_wanted"] is not None:
            axes.plot([result["ratio_wanted"]] * 2, [row - 0.4, row + 0.4], color="black")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as transformers (black: target)")
    axes.set_title(title.replace("; ", "\n", 1), fontsize=8)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = read_arguments(__doc__, GROUPS, rounds=7, name="results")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    title, console, results = machine(), Console(width=150), []
    with console.status("") as status:
        for group in arguments.only:
            status.update(f"{group}: making inputs")
            for stage in GROUPS[group]():
                status.update(stage.name)
                results.append(measure(stage, arguments.rounds))
                console.print(f"{stage.name}: {results[-1]['ratio']:.2f}")
    console.print(table_of(results, title))
    write_record(arguments.out / "results.json", title, arguments.rounds, results)
    plot(results, title, arguments.out / "results.png")


if __name__ == "__main__":
    main()
