"""The documentation site: every public name has an entry, every page is in it, and it builds without a warning."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "maskcls_hf",
    "maskcls_hf.convert",
    "maskcls_hf.data",
    "maskcls_hf.data.layouts",
    "maskcls_hf.data.validation",
    "maskcls_hf.hub",
    "maskcls_hf.inference",
    "maskcls_hf.metrics",
    "maskcls_hf.training",
    "maskcls_hf.visual",
]


def entries() -> list[str]:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)]


def of_documented(name: str, documented: dict[str, object]) -> bool:
    """By its path; or what it is stands elsewhere under the same name, such as data.Segments."""
    value, last = pkgutil.resolve_name(name), name.rpartition(".")[2]
    return name in documented or any(
        entry.rpartition(".")[2] == last and (known is value or known == value) for entry, known in documented.items()
    )


def test_no_public_module_is_forgotten():
    found = {
        module.name
        for module in pkgutil.walk_packages([str(ROOT / "src" / "maskcls_hf")], "maskcls_hf.")
        if module.ispkg and getattr(importlib.import_module(module.name), "__all__", None)
    }
    assert found | {"maskcls_hf"} == set(PUBLIC)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_entry(module):
    documented = {name: pkgutil.resolve_name(name) for name in entries()}
    names = [f"{module}.{name}" for name in importlib.import_module(module).__all__]
    assert names and [name for name in names if not of_documented(name, documented)] == []


def test_no_entry_stands_twice():
    names = entries()
    assert len(names) > 100 and len(set(names)) == len(names)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("material", reason="needs the extra `docs`")
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_builds_without_a_warning_and_can_be_searched(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    index = (site / "search" / "search_index.json").read_text()
    assert "post_process_panoptic_segmentation" in index and "Two commands" in index


def test_needs_nothing_from_elsewhere(site):
    loaded = re.compile(r"""<(?:script|img|link(?![^>]*rel="canonical"))[^>]*(?:src|href)=["']?(https?:[^"' >]+)""")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 5
    assert {url for page in pages for url in loaded.findall(page.read_text())} == set()
