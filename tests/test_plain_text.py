"""Names of any origin are text on a terminal and in Markdown."""

import io

import pytest
from rich.table import Table

from maskcls_hf.metrics import per_class_markdown, per_class_table
from maskcls_hf.utils.plain_text import PlainConsole, markdown, markdown_code, printable

MARKUP = ["car [moving]", "[/]", "[bold]x[/bold]", "[link=http://evil]x[/link]", ":smile: x", "[red]"]
CONTROLS = [
    "\x1b[31mred",
    "\x1b]52;c;ZXZpbA==\x07",
    "a\rb",
    "a\nb",
    "a\x08b",
    "\u202eabc",
    "\u2028",
    "\udc80",
    "\x9b31m",
]


def shown(*parts: object, **options) -> str:
    """What a console prints, in a wide terminal with colors."""
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=True, width=200, color_system=None, **options)
    for part in parts:
        console.print(part)
    return out.getvalue()


@pytest.mark.parametrize("name", MARKUP)
def test_markup_is_text_everywhere(name):
    table = Table("class", title=name)
    table.add_row(name)
    assert shown(name).strip() == name
    assert shown(table).count(name) == 2
    assert name in shown(per_class_table({name: {"iou": 0.5}}))


@pytest.mark.parametrize("name", CONTROLS)
def test_control_characters_are_shown_as_their_escapes(name):
    line = printable(name)
    assert line.isprintable() and line.encode() and line != name
    table = per_class_table({name: {"iou": 0.5}})
    for text in (shown(name), shown(table)):
        assert all(part.isprintable() for part in text.split("\n"))


def test_plain_names_stay():
    for name in ("traffic-light", "caf\u00e9", "\u0645\u06cc\u200c\u062e", "\u8eca (2)", "C:\\data", "a  b"):
        assert printable(name) == name
    assert printable("two\nlines\x07", keep_lines=True) == "two\nlines\\x07"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("traffic-light 1.5", "traffic-light 1.5"),
        ("a\n\n# Heading", "a&#92;n&#92;n\\# Heading"),
        ("<img src=x onerror=alert(1)>", "\\<img src=x onerror=alert(1)\\>"),
        ("![x](http://evil/track.png)", "!\\[x\\](http&#58;//evil/track.png)"),
        ("a|b", "a\\|b"),
        ("*a* _b_ `c` ~d~", "\\*a\\* \\_b\\_ \\`c\\` \\~d\\~"),
        ("&lt;b&gt;", "&#38;lt;b&#38;gt;"),
        ("$x$ \\(y\\)", "&#36;x&#36; &#92;(y&#92;)"),
        ("- item", "&#45; item"),
        ("1. item", "&#49;. item"),
        ("    code", "code"),
        (":smile:", "&#58;smile:"),
        ("www.evil.org me@evil.org", "www&#46;evil.org me&#64;evil.org"),
        ("\x1b[31m\u202e", "&#92;x1b\\[31m&#92;u202e"),
    ],
)
def test_markdown_of_names(name, expected):
    assert markdown(name) == expected
    assert f"| {expected} | 50.0 |" in per_class_markdown({name: {"iou": 0.5}})


def test_markdown_of_prose_keeps_addresses():
    assert markdown("See https://a.org, <b>", links=True) == "See https://a.org, \\<b\\>"


def test_code_spans_cannot_be_left():
    assert markdown_code("train") == "`train`"
    assert markdown_code("a`` <b>\n") == "``` a`` <b>\\n ```"
