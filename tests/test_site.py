"""The documentation site: every public name has an entry, every page is in it, and it builds without a warning."""

import importlib
import json
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
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
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


def test_the_tutorial_is_kept_as_it_came_out():
    """Every cell was run, in their order, and none failed."""
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    ran = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    kinds = {output["output_type"] for cell in ran for output in cell["outputs"]}
    assert kinds <= {"stream", "display_data", "execute_result"}


@pytest.mark.slow
def test_the_tutorial_runs_from_labels_to_a_shared_model(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `docs`")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `docs`")
    (tmp_path / "docs").mkdir()
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", 4)
    place = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place).execute()

    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "0 errors, 0 warnings" in printed
    scores = dict(re.findall(r"(\w+): [\d.]+ -> ([\d.]+)", printed))
    assert float(scores["mean_iou"]) > 0.85 and float(scores["pq_things"]) > 0.4
    shared = {file.name for file in (tmp_path / "docs" / "runs" / "coins" / "look").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "modeling_maskcls.py"} <= shared
