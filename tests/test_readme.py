"""The snippets of README and site run in their order, in a folder that holds what they speak of."""

import io
import json
import pkgutil
import re
import shlex
import shutil
import tokenize
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from checkpoints import picture
from conftest import SHARED, needs_shared
from maskcls_hf import Segments
from maskcls_hf.cli.main import app
from maskcls_hf.cli.parts import ENTRY_POINTS
from maskcls_hf.data import open_dataset
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import InstanceF1
from pages import run_page, snippets

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
NUCLEI = Path("model_cards/maskcls-nuclei-tiny")


def make_folder(root: Path) -> None:
    """The model and the image of the repository, and data: two images a split, with labels and void."""
    shutil.copytree(ROOT / NUCLEI, root / NUCLEI)
    shutil.copy(ROOT / "nuclei.png", root)
    data = root / "my_data"
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (data / split / folder).mkdir(parents=True)
        for name in "ab":
            picture(64, 64).save(data / split / "images" / f"{name}.png")
            labels = np.zeros((64, 64), dtype=np.uint8)
            labels[:, 32:] = 1
            labels[:4] = 255
            Image.fromarray(labels).save(data / split / "labels" / f"{name}.png")
    (data / "labels.json").write_text(json.dumps({"0": "sky", "1": "lake"}))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_with_snippets_is_run_here():
    counts = {page.name: len(snippets(page.read_text())) for page in PAGES}
    assert {name: count for name, count in counts.items() if count} == {
        "README.md": 1, "segment.md": 2, "train.md": 1, "share.md": 1, "convert.md": 1
    }  # fmt: skip


def test_snippets_of_the_readme_run(folder):
    of_classes = [info["label_id"] for info in run_page(README)["found"]["segments_info"]]
    assert f"That gives {of_classes.count(1)} nuclei" in README.read_text()
    assert README.read_text().count("\n") < 150


def test_snippets_about_segmenting_run(folder):
    assert run_page(DOCS / "segment.md")["semantic_map"].shape == (128, 128)


def test_snippets_from_training_to_sharing_run(folder):
    assert run_page(DOCS / "train.md")["fresh"].config.num_labels == 2
    names = run_page(DOCS / "guides" / "trainer.md")
    assert names["model"].config.id2label == {0: "sky", 1: "lake"}
    assert (folder / "runs" / "trainer" / "final" / "modeling_maskcls.py").is_file()
    run_page(DOCS / "share.md")


def test_snippets_about_conversion_run(folder):
    assert "pq" in run_page(DOCS / "convert.md")["evaluator"].compute()


def test_the_first_command_gives_the_picture_beside_it(folder):
    text = (DOCS / "segment.md").read_text()
    (command,) = re.findall(r"^    maskcls (segment nuclei\.png .*)$", text, flags=re.MULTILINE)
    (picture,) = re.findall(r"!\[The overlay that this command writes\]\((.*)\)", text)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    written, shown = (np.asarray(Image.open(path)) for path in (folder / "found/overlay/nuclei.png", DOCS / picture))
    assert written.shape == shown.shape and (written == shown).mean() > 0.995  # processors round in ways of their own


@needs_shared
def test_so_many_of_the_marked_nuclei_are_among_them():
    """Against the annotation of the image, which is beside the repository."""
    data = open_dataset(SHARED / "data" / "dsb2018_nuclei", "val")
    pixels = np.asarray(Image.open(ROOT / "nuclei.png").convert("RGB"))
    (true,) = (
        sample["segments"] for sample in data if np.array_equal(sample["image"].permute(1, 2, 0).numpy(), pixels)
    )
    metric = InstanceF1(data.id2label, data.stuff_ids)
    found = Segments.from_output(Predictor.from_pretrained(ROOT / NUCLEI)(ROOT / "nuclei.png"))
    metric.add(metric.measure(found, true)[None])
    marked = sum(label not in data.stuff_ids for label in true.class_labels.tolist())
    matched = round(metric.compute()["recall"] * marked)
    assert f"which hold {matched} of the {marked} that people marked" in README.read_text()


def test_files_that_are_named_exist():
    text = "".join(page.read_text() for page in PAGES)
    named = re.findall(r"`((?:examples|docs|tests|benchmarks|src|model_cards)/[\w./-]*)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_files_of_the_tree_exist():
    tree = (DOCS / "design.md").read_text()
    names = {file.name for folder in ("src", "examples", "benchmarks") for file in (ROOT / folder).rglob("*")}
    named = re.findall(r"\b\w+\.py\b", tree)
    assert len(named) > 10 and [name for name in named if name not in names] == []


def test_docstrings_and_comments_point_to_what_there_is():
    """Files by their names, what the package holds by dotted paths, functions and classes in links."""
    root = ROOT
    files = {
        file.name for folder in ("src", "examples", "benchmarks", "tests") for file in (root / folder).rglob("*.py")
    }
    words: set[str] = set()
    links, lost, pointers = [], [], 0
    for file in sorted((root / "src").rglob("*.py")):
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            if token.type == tokenize.NAME:
                words.add(token.string)
            elif token.type == tokenize.COMMENT or token.string.startswith(('"""', 'r"""')):
                where = f"{file.name}:{token.start[0]}"
                named = re.findall(r"\b\w+\.py\b", token.string)
                lost += [(where, name) for name in named if name not in files]
                dotted = re.findall(r"`(maskcls_hf(?:\.\w+)+)`", token.string)
                lost += [(where, name) for name in dotted if name != ENTRY_POINTS and not is_there(name)]
                links += [(where, name) for name in re.findall(r"\[`(?:\w+\.)*(\w+)`\]", token.string)]
                pointers += len(named) + len(dotted)
    assert lost + [link for link in links if link[1] not in words] == []
    assert pointers > 10 and len(links) > 10


def is_there(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True
