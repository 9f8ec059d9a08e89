"""Tables of scores by class, for a terminal or a model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from ..utils.plain_text import cell, markdown, percent

PerClass = Mapping[str, Mapping[str, float]]


def per_class_table(*per_class: PerClass, title: str | None = None) -> Table:
    """What `per_class()` of one or more metrics returned, as a table of rich: a row a class, in per cent.

    Args:
        per_class: class -> score -> value, 0 to 1.
        title: above the table.
    """
    headings, *rows = _cells(*per_class)
    table = Table(title=None if title is None else cell(title))
    for column, heading in enumerate(headings):
        table.add_column(cell(heading), justify="right" if column else "left")
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def per_class_markdown(*per_class: PerClass) -> str:
    """The same as Markdown.

    Examples:
        >>> print(per_class_markdown({"road": {"iou": 0.917}, "sky": {"iou": 0.5}}))
        | class | iou |
        | --- | ---: |
        | road | 91.7 |
        | sky | 50.0 |
    """
    headings, *rows = _cells(*per_class)
    return markdown_table([list(map(markdown, headings)), *([markdown(name), *values] for name, *values in rows)])


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; the first column is aligned left, others right.

    Args:
        rows: texts for the cells, as they are; headings first.

    Examples:
        >>> print(markdown_table([["model", "PQ"], ["tiny", "64.0"]]))
        | model | PQ |
        | --- | ---: |
        | tiny | 64.0 |
    """
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(*per_class: PerClass) -> list[list[str]]:
    """Headings, then rows; "-" where a class has no such score."""
    names = list(dict.fromkeys(name for scores in per_class for name in scores))
    headings = [list(dict.fromkeys(key for values in scores.values() for key in values)) for scores in per_class]
    lines = [["class", *(key for keys in headings for key in keys)]]
    for name in names:
        values = [
            scores.get(name, {}).get(key, math.nan)
            for scores, keys in zip(per_class, headings, strict=True)
            for key in keys
        ]
        lines.append([name, *map(percent, values)])
    return lines
