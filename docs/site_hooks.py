"""What mkdocs does not do by itself: some pages are files outside docs/, a notebook, or what a command says of itself.

README.md is the first page; model cards, pictures of benchmarks and the like join where a page links to them. A link is
written as it is right in the repository, and is changed here to where its file stands in the site; what is not in the
site is named without a link. mkdocs calls `on_...`: https://www.mkdocs.org/dev-guide/plugins/#events
"""

import base64
import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "docs/tutorial.ipynb": "tutorial.md"}  # the others of docs/ only lose "docs/"
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
JOINING = re.compile(r"(?:model_cards|benchmarks)/.*\.(?:md|png|json|yaml)")  # where linked to
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
UNITS = re.compile(r"(?<=\d) (?=(?:ms|s|MB|GB|%)\b|%)")  # which stay with their numbers
FENCED = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds what there is of PROJECT to its section."""
    for section in config.nav or []:
        if "Project" in section:
            section["Project"] += [name for name in PROJECT if (ROOT / name).is_file()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of other files, and what they link to."""
    text, pictures = notebook_page(json.loads((ROOT / "docs" / "tutorial.ipynb").read_text()))
    generated = {"index.md": (ROOT / "README.md").read_text(), "tutorial.md": text, **pictures}
    generated["reference/commands.md"] = commands_page()
    generated |= {name: (ROOT / name).read_text() for name in PROJECT if (ROOT / name).is_file()}
    waiting = [*generated, *(file.src_uri for file in files.documentation_pages())]
    while waiting:
        uri = waiting.pop()
        content = generated[uri] if uri in generated else (ROOT / "docs" / uri).read_text()
        for path in targets(content, uri) if isinstance(content, str) and uri.endswith(".md") else ():
            if JOINING.fullmatch(path) and path not in generated and (ROOT / path).is_file():
                generated[path] = (ROOT / path).read_bytes() if path.endswith(".png") else (ROOT / path).read_text()
                waiting.append(path)
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links from the repository's places to the site's."""
    uri = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        picture, text, _, anchor = link.groups()
        path = repository_path(link[3], uri)
        if path is None:
            return link[0]
        target = MOVED.get(path, path.removeprefix("docs/"))
        if path.startswith("docs/") or files.get_file_from_path(target) is not None:
            return f"{picture}[{text}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{anchor or ''})"
        return text if "`" in text or text == path else f"{text} (`{path}`)"

    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else UNITS.sub("\u00a0", LINK.sub(moved, part)) for part in parts)


def targets(text: str, uri: str) -> list[str]:
    """Paths in the repository of all that a page links to."""
    links = [link for part in FENCED.split(text) if not part.startswith("```") for link in LINK.finditer(part)]
    return [path for link in links if (path := repository_path(link[3], uri)) is not None]


def repository_path(target: str, uri: str) -> str | None:
    """Where a link of the page `uri` leads to in the repository; None: elsewhere."""
    if "://" in target or target.startswith(("mailto:", "/")):
        return None
    outside = {new: old for old, new in MOVED.items()} | {name: name for name in PROJECT}
    page = outside.get(uri, uri if JOINING.fullmatch(uri) else f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


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
    marks = "````" if "```" in text else "```"
    return f"{marks}{language}\n{text}\n{marks}"


def commands_page() -> str:
    """What each command of `maskcls` does and takes, as its --help says."""
    sys.path.insert(0, str(ROOT / "src"))
    import maskcls_command

    maskcls_command.parsing = True  # torch and transformers are not imported
    from maskcls_hf.cli.main import app

    parts = ["# Commands", "As `maskcls COMMAND --help` says it; defaults in parentheses."]
    for name, command in sorted(get_command(app).commands.items()):
        rows = ["| option | what it does |", "|---|---|"]
        for option in (parameter for parameter in command.params if not getattr(parameter, "hidden", False)):
            given = option.opts if option.param_type_name == "option" else [option.name.upper()]
            default = "" if option.default in (None, False, [], ()) else f" (`{option.default}`)"
            needed = " Needed." if option.required and option.param_type_name == "option" else ""
            written = ", ".join(f"`{word}`" for word in [*given, *option.secondary_opts])
            rows.append(f"| {written} | {str(option.help).replace('|', chr(92) + '|')}{default}{needed} |")
        parts += [f"## maskcls {name}", command.help or "", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"
