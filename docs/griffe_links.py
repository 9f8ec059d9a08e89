"""In docstrings a public name in brackets, [`Segments`], becomes a link to its entry of the reference.

Types in the style of transformers, "name (`int`, *optional*): what it is", lose their marks: they are shown as code.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Extension, Object

REFERENCE = Path(__file__).parent / "reference"
TYPE = re.compile(r"^( +\w+ \()(.+?)(?=\):)", re.M)
RAISED = re.compile(r"^( +)`(\w+)`:", re.M)
BRACKETS = re.compile(r"\[`((?:\w+\.)*(\w+))`\](?![\[(])")


@cache
def entries() -> dict[str, str]:
    """Dotted paths of all entries of the reference by their last names."""
    paths = [path for page in REFERENCE.glob("*.md") for path in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    return {path.rpartition(".")[2]: path for path in paths}


class Links(Extension):
    """Called by griffe for each module, class, function and attribute that it has read."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = TYPE.sub(lambda field: field[1] + re.sub("[`*]", "", field[2]), obj.docstring.value)
            obj.docstring.value = BRACKETS.sub(link, RAISED.sub(r"\1\2:", text))


def link(name: re.Match[str]) -> str:
    path = entries().get(name[2])
    return f"[`{name[1]}`][{path}]" if path else f"`{name[1]}`"
