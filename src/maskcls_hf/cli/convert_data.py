"""`maskcls convert-data`: annotated images from one layout to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.plain_text import printable
from .console import console, ends_in_a_line

FolderArgument = Annotated[Path, typer.Argument(metavar="IN", help="Folder of the data.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="An empty folder; made if need be.")]
ToOption = Annotated[str, typer.Option("--to", help="Layout to write: coco_instances (coco), yolo or labelme.")]
LayoutOption = Annotated[str | None, typer.Option(help="Layout of IN. Default: found by looking.")]
SplitOption = Annotated[list[str] | None, typer.Option(help="Part of IN; may be repeated. Default: all.")]
BoxesOption = Annotated[bool, typer.Option("--boxes", help="Take objects that are boxes alone as masks.")]


def convert_data(
    data: FolderArgument,
    out: OutArgument,
    to: ToOption,
    layout: LayoutOption = None,
    split: SplitOption = None,
    boxes: BoxesOption = False,
) -> None:
    """Write annotated images in the layout of another tool; says what this layout cannot hold.

    Images are copied. Data without splits becomes the split `train`. COCO and LabelMe keep each mask pixel by pixel;
    YOLO has outlines along the edges of the pixels, one ring an object, with bridges to parts and holes.

    Example: `maskcls convert-data labelme_folder coco_folder --to coco`
    """
    from ..data.conversion import convert_data as convert
    from ..data.conversion import layout_named

    with ends_in_a_line("", OSError, ValueError, TypeError, ImportError):
        target = layout_named(to)
        lost = convert(data, out, target, layout, split or (), {"boxes": True} if boxes else {})
        console.print(f"Written to {printable(out)}.", soft_wrap=True)
        for what, number in lost.items():
            console.print(f"Lost, as {printable(target)} cannot hold it: {number} {what}.", soft_wrap=True)
