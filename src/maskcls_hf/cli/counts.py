"""What `maskcls segment` found, in numbers: a line a class for the terminal, a row a segment as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from rich.table import Table

from ..utils.plain_text import cell, percent

COLUMNS = (
    "image", "id", "class", "area", "box_left", "box_top", "box_width", "box_height", "centroid_x", "centroid_y",
    "score",
)  # fmt: skip


def segments_of(content: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Image and record of each segment, in the order of the results, of a JSON of `maskcls segment`."""
    images = {image["id"]: image for image in content["images"]}
    for annotation in content["annotations"]:
        for segment in annotation.get("segments_info", [annotation]):
            yield images[annotation["image_id"]], segment


def csv_text(content: Mapping[str, Any]) -> str:
    """A row a segment, as RFC 4180 has it. What a record lacks, as semantic ones a score, is empty.

    `image` is the path of the file, `id` that of the JSON (semantic: of the class); lengths and areas are in pixels
    of the image, x to the right and y down from the outer corner of its first pixel, whose center is (0.5, 0.5).
    """
    names = {category["id"]: category["name"] for category in content["categories"]}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for image, segment in segments_of(content):
        label, score = segment["category_id"], segment.get("score")
        writer.writerow([
            image.get("source", image["file_name"]), segment.get("id", label), names[label], segment["area"],
            *segment.get("bbox", [""] * 4), *segment.get("centroid", [""] * 2),
            "" if score is None else f"{score:.4f}",
        ])  # fmt: skip
    return text.getvalue().encode("utf-8", "backslashreplace").decode()  # names of files may be no text


def counts_table(content: Mapping[str, Any], sources: Collection[str], semantic: bool) -> Table:
    """Number and area of the segments of each class that was found, over some of the images.

    Args:
        content: of a JSON of `maskcls segment`.
        sources: `source` of the images that count.
        semantic: there are areas of classes, not segments.
    """
    images = [image for image in content["images"] if image.get("source") in sources]
    pixels = sum(image["height"] * image["width"] for image in images)
    found: dict[int, list[tuple[int, int]]] = {}  # class -> image and area of each segment
    for image, segment in segments_of(content):
        if image.get("source") in sources:
            found.setdefault(segment["category_id"], []).append((image["id"], segment["area"]))
    table = Table(box=None)
    headings = ("images", *(() if semantic else ("segments",)), "mean area, px", "% of all pixels")
    table.add_column("class")
    for heading in headings:
        table.add_column(heading, justify="right")
    for category in content["categories"]:
        of_class = found.get(category["id"])
        if of_class:
            in_images, area = len({image for image, _ in of_class}), sum(area for _, area in of_class)
            number = () if semantic else (str(len(of_class)),)
            mean = f"{area / len(of_class):.0f}"
            table.add_row(cell(category["name"]), str(in_images), *number, mean, percent(area / pixels, 2))
    return table
