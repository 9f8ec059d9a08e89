"""What mkdocs does not do by itself: README.md is the first page, the notebook one of them, guides are found by name.

mkdocs calls these functions by their names: https://www.mkdocs.org/dev-guide/plugins/#events
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The guides of the folder: first those that `extra.guides` names, in its order, then others."""
    there = sorted(path.stem for path in (ROOT / "docs" / "guides").glob("*.md"))
    ordered = [name for name in config.extra["guides"] if name in there]
    ordered += [name for name in there if name not in ordered]
    for section in config.nav or []:
        if "Guides" in section:
            section["Guides"] += [f"guides/{name}.md" for name in ordered]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of other files."""
    files.append(File.generated(config, "index.md", content=first_page((ROOT / "README.md").read_text())))
    if NOTEBOOK.is_file():
        text, pictures = notebook_page(json.loads(NOTEBOOK.read_text()))
        files.append(File.generated(config, "tutorial.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))
    return files


def first_page(readme: str) -> str:
    """README.md with its links as seen from docs/; what lies outside is named."""

    def moved(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        if target.startswith("docs/"):
            return f"{picture}[{text}]({target.removeprefix('docs/')})"
        return text if text.startswith("`") else f"{text} (`{target}`)"

    return LINK.sub(moved, readme)


def notebook_page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook's cells and their outputs; its pictures by the names of their files."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        shell = source.startswith("!")
        parts.append(fence(source.removeprefix("!"), "bash" if shell else "python"))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tutorial_{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What this cell shows]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(fence(text.rstrip(), "text"))
    return "\n\n".join(parts) + "\n", pictures


def fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
