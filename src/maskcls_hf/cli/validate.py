"""`maskcls validate`: the label validator; a table for people, a JSON file for programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..utils.plain_text import PlainConsole, cell, printable
from ..utils.writing import write_json
from .console import LayoutOption, check_new_file, complain, fail, progress_bar

if TYPE_CHECKING:
    from ..data.validation import Finding, Report, SplitReport

COLORS = {"error": "red", "warning": "yellow", "note": "cyan"}
_LONGEST_EDGE = 4  # times the shortest: the image processor's 512 and 2048
_ALL_CLASSES = 60  # a table of more shows its two ends
_SHOWN_FINDINGS = 4
_SHOWN_SIZES = 4


def _is_folder(path: Path) -> Path:
    if not path.is_dir():
        raise typer.BadParameter(f"{printable(path)} is no folder.", param_hint="DATA")
    return path


DataArgument = Annotated[Path, typer.Argument(metavar="DATA", callback=_is_folder, help="Folder of the data.")]
SplitsOption = Annotated[
    list[str] | None, typer.Option("--split", help="A part of the data, such as train; all. Can be given again.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", "-r", help="Name or file: gives splits, layout, options, resolution and queries."),
]
SizeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Shortest edge of images in training, in pixels; the longest: at most 4 times that."),
]
QueriesOption = Annotated[int | None, typer.Option(min=1, help="Queries of the model; 100.")]
VoidOption = Annotated[
    list[int] | None, typer.Option("--void", help="A label value that is unlabeled, as 255 is. Can be given again.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Read this many images of each split, evenly chosen; all.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the report to this file too.")]
StrictOption = Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")]


def validate(
    data: DataArgument,
    split: SplitsOption = None,
    layout: LayoutOption = None,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    num_queries: QueriesOption = None,
    void: VoidOption = None,
    limit: LimitOption = None,
    json_file: JsonOption = None,
    strict: StrictOption = False,
) -> None:
    """Read every image and label of a data set and say what is wrong.

    Counts, sizes and a table of the classes; files that cannot be read, labels of another size than their image, in
    color or with values that are no class, ids shifted by one, missing partners, images in two splits; segments that
    vanish at the training resolution, more segments than queries; and for COCO files every record against its mask.

    Exit code: 0 without errors, 1 with errors, 2 for a wrong call.

    Example: `maskcls validate camvid --recipe camvid --json report.json`
    """
    from ..data.layouts import LAYOUTS
    from ..data.validation import validate_dataset

    if layout is not None and layout not in LAYOUTS:
        raise typer.BadParameter(f"{printable(layout)}: the layouts are {', '.join(LAYOUTS)}.", param_hint="--layout")
    if json_file is not None:
        try:
            check_new_file(json_file, "--json")
        except ValueError as error:
            raise typer.BadParameter(printable(error), param_hint="--json") from error
    settings: dict[str, Any] = _of_recipe(recipe, data) if recipe else {"num_queries": 100, "size": _edges(512)}
    if split:
        settings["splits"] = split
    if layout:
        settings["layout"] = layout
    if size:
        settings["size"] = _edges(size)
    if num_queries:
        settings["num_queries"] = num_queries
    if void:
        settings["options"] = {**settings.get("options", {}), "void_values": void}
    with progress_bar("Checking", transient=True) as progress:
        bar = progress.add_task("", total=None)

        def show_progress(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        try:
            report = validate_dataset(data, limit=limit, on_progress=show_progress, **settings)
        except (OSError, TypeError, ValueError) as error:  # options of a recipe that no reader takes
            fail(error)
    if json_file is not None:
        write_json(json_file, report.to_dict(), indent=1)
    show(report, PlainConsole())
    if report.count("error") or (strict and report.count("warning")):
        raise typer.Exit(1)


def _edges(shortest: int) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": _LONGEST_EDGE * shortest}


def _of_recipe(name: str, data: Path) -> dict[str, Any]:
    """Arguments of `validate_dataset`. Where a training would hold out images by itself, it needs no split for them."""
    from ..data.held_out import has_split, other_validation, training_split
    from ..training.recipe import load_recipe  # with transformers' Trainer: seconds that others need not wait

    try:
        recipe = load_recipe(name)
    except (OSError, ValueError) as error:
        complain(f"Error: {error}")
        raise typer.Exit(2) from error
    section = recipe.data
    place = data, section.layout, section.options
    splits: list[str | None] = [section.train_split, section.eval_split]
    holds_out = section.val_share is not None and not has_split(section.eval_split, *place)
    if holds_out and not other_validation(section.train_split, *place):
        splits = [training_split(section.train_split, *place)]
    processor, queries = recipe.image_processor, recipe.model.config.get("num_queries", 100)
    return {
        "splits": splits,
        "layout": section.layout,
        "options": section.options,
        "size": processor.get("size", _edges(512)) if processor.get("do_resize", True) else None,
        "num_queries": queries if isinstance(queries, int) and recipe.model.kind == "mask_classification" else None,
    }


def show(report: Report, out: Console) -> None:
    """Print a report: splits, sizes, classes, findings and their number."""
    heading = Text.assemble((printable(report.root), "bold"), f": layout {report.layout or 'unknown'}")
    out.print(heading.append(f", {report.kind} labels\n"))
    if report.splits:
        out.print(_split_table(report))
        for split in report.splits:
            if split.sizes:
                out.print(_sizes(split), soft_wrap=True, highlight=False)
        if any(split.classes for split in report.splits):
            out.print()
            out.print(_class_table(report))
    for kind, findings in report.grouped().items():
        out.print()
        for line in _finding_lines(kind, findings):
            out.print(line, soft_wrap=True, highlight=False)
    counts = [_counted(report.count(severity), severity) for severity in COLORS]
    read = sum(split.checked for split in report.splits)
    out.print(f"\n{', '.join(counts)} in {read} images; {report.seconds:.0f} s.")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _split_table(report: Report) -> Table:
    table = Table("split", title="Images", title_justify="left")
    for column in ("images", "labels", "read", "segments", "per image", "unlabeled"):
        table.add_column(column, justify="right")
    for split in report.splits:
        table.add_row(
            cell(split.name or "all"),
            str(split.images),
            str(split.labels),
            str(split.checked),
            str(sum(split.segments)),
            f"median {split.median_segments:g}, most {max(split.segments, default=0)}",
            _percent(split.void_pixels, split.pixels),
        )
    return table


def _sizes(split: SplitReport) -> str:
    sizes = [f"{width} x {height} ({number})" for (height, width), number in split.sizes.most_common(_SHOWN_SIZES)]
    if len(split.sizes) > _SHOWN_SIZES:
        sizes.append(f"{len(split.sizes) - _SHOWN_SIZES} more sizes")
    return printable(f"{split.name or 'Images'}, width x height: {', '.join(sizes)}")


def _class_table(report: Report) -> Table:
    """Images and segments with each class in each split, and its share of all pixels."""
    title = "Classes: images"
    if report.kind != "semantic":
        title += " / segments"
    table = Table(title=f"{title}, share of the pixels", title_justify="left")
    table.add_column("id", justify="right")
    table.add_column("name")
    for split in report.splits:
        table.add_column(cell(split.name or "all"), justify="right")
        table.add_column("pixels", justify="right")
    rows = list(_class_rows(report))
    half = _ALL_CLASSES // 2
    for row in rows if len(rows) <= _ALL_CLASSES else rows[:half]:
        table.add_row(*map(cell, row))
    if len(rows) > _ALL_CLASSES:
        table.add_row("...", f"{len(rows) - _ALL_CLASSES} more: see --json")
        for row in rows[-half:]:
            table.add_row(*map(cell, row))
    return table


def _class_rows(report: Report) -> Iterator[list[str]]:
    """Classes that occur: a few in the order of their ids, many with the largest first."""
    labels = sorted(set().union(*(split.classes for split in report.splits)))
    if len(labels) > _ALL_CLASSES:
        labels.sort(key=lambda label: -sum(count.pixels for count in report.class_counts(label)))
    for label in labels:
        row = [str(label), report.class_names.get(label, "?")]
        for split, count in zip(report.splits, report.class_counts(label), strict=True):
            number = f"{count.images}" if report.kind == "semantic" else f"{count.images} / {count.segments}"
            row += [number, _percent(count.pixels, split.pixels)]
        yield row


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "-"


def _finding_lines(kind: str, findings: list[Finding]) -> Iterator[str | Text]:
    from ..data.validation import RULES

    rule = RULES[kind]
    color = COLORS[rule.severity]
    number = f" ({len(findings)})" if len(findings) > 1 else ""
    yield Text.assemble(
        (rule.severity.upper(), f"bold {color}"), " ", (f"{rule.title}{number}", "bold"), " ", (kind, "dim")
    )
    for finding in findings[:_SHOWN_FINDINGS]:
        where = finding.file or finding.split or ""
        yield printable(f"  {where}: {finding.message}" if where else f"  {finding.message}")
    if len(findings) > _SHOWN_FINDINGS:
        yield f"  ... and {len(findings) - _SHOWN_FINDINGS} more, see --json"
    yield f"  What to do: {rule.advice}"
