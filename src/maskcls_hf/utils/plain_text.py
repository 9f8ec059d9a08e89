"""Names and messages of any origin as text, and nothing else: on a terminal, in Markdown."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

ACTED_ON = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, changes of direction, half characters, ends of lines
JOINERS = "\u200c\u200d"  # which some scripts are written with


def printable(text: object, keep_lines: bool = False) -> str:
    r"""One line in which nothing moves the cursor, changes direction or ends the line: `\x1b`, `\u202e`, `\n`.

    Args:
        text: anything that has a text.
        keep_lines: line breaks stay, for a message of several lines.
    """

    def shown(character: str) -> str:
        acted_on = unicodedata.category(character) in ACTED_ON and character not in JOINERS
        if not acted_on or (keep_lines and character == "\n"):
            return character
        return character.encode("unicode_escape").decode("ascii")

    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(shown, text))


MARKS = re.compile(r"[&\\$`*_\[\]|<>#~]|^[-+=](?!\S)|^\d+(?=[.)](?:\s|$))|:(?=[\w+-]+:)")
LINKS = re.compile(r"(?<=\bwww)\.|:(?=//)|@", re.IGNORECASE)


def markdown(text: object, links: bool = False) -> str:
    """Text for a paragraph, a list, a heading, an alt text or a table's cell of Markdown.

    Args:
        text: anything that has a text.
        links: addresses stay what readers can follow; for prose of the card's author.
    """

    def harmless(mark: re.Match[str]) -> str:
        # Backslashes and dollars as numbers: on the Hub they begin formulas, escaped or not.
        character = mark[0][0]
        return f"\\{mark[0]}" if character in "`*_[]|<>#~" else f"&#{ord(character)};{mark[0][1:]}"

    marks = MARKS if links else re.compile(f"{MARKS.pattern}|{LINKS.pattern}", re.IGNORECASE)
    return marks.sub(harmless, printable(text).strip())


def markdown_code(text: object) -> str:
    """Text as a code span of Markdown.

    Examples:
        >>> markdown_code("num_queries")
        '`num_queries`'
    """
    text = printable(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text or not text.strip() else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def percent(score: float | None, digits: int = 1) -> str:
    """A score, from 0 to 1, in per cent; "-" where there is none.

    Examples:
        >>> percent(0.4567), percent(None)
        ('45.7', '-')
    """
    return "-" if score is None or math.isnan(score) else f"{100 * score:.{digits}f}"


def cell(text: object) -> Text:
    """Text for a table of rich, whatever console prints it."""
    return Text(printable(text))


class PlainConsole(Console):
    """Shows texts as they are: without markup, codes of emoji, or characters that a terminal acts on."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich, of printable characters."""
        return super().render_str(printable(text, keep_lines=True), **options)
