"""The guides run: every snippet, the commands that are cheap, and what they are said to print."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskcls_hf.data.layouts import LAYOUTS
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics.metric import METRICS
from maskcls_hf.models.configuration_maskcls import REGISTRIES
from pages import ROOT, blocks, forget_modules, links, run_page
from test_pretrained_backbones import make_package
from test_readme import NUCLEI, make_folder

GUIDES = ROOT / "docs" / "guides"
# Page -> beginnings of the commands that are run, beside those whose output the page shows.
RUN = {
    "per_pixel_conversion": ["maskcls convert segformer"],
    "coming_from": ["maskcls convert maskformer", "maskcls convert my-model"],
    "own_parts": ["maskcls evaluate", "maskcls validate"],
    "metrics": ["maskcls evaluate"],
    "thresholds": ["maskcls tune --model model_cards"],
}
# Page -> packages that it shows and that not everybody has.
NEEDS = {
    "augmentations": ["albumentations"],
    "export_and_serving": ["onnxruntime", "onnxscript"],
    "pretrained_backbones": ["timm"],
}


def write_cells(root: Path) -> None:
    """Parts of the image of nuclei with what the model finds in them, two for training and two for validation."""
    image = Image.open(root / "nuclei.png").convert("RGB")
    predict = Predictor.from_pretrained(root / NUCLEI)
    for place, split in enumerate(("train", "train", "val", "val")):
        part = image.crop((64 * place, 0, 64 * place + 128, 128))
        for folder in ("images", "instances"):
            (root / "cells" / split / folder).mkdir(parents=True, exist_ok=True)
        part.save(root / "cells" / split / "images" / f"{place}.png")
        found = predict(part, task="panoptic")
        nuclei = [segment["id"] for segment in found["segments_info"] if segment["label_id"] == 1]
        ids = np.array([0, *range(1, len(nuclei) + 1)], dtype=np.uint8)
        index = torch.zeros(int(found["segmentation"].max()) + 2, dtype=torch.int64)
        index[nuclei] = torch.arange(1, len(nuclei) + 1)
        Image.fromarray(ids[index[found["segmentation"].clamp(min=0)].numpy()]).save(
            root / "cells" / split / "instances" / f"{place}.png"
        )
    (root / "cells" / "labels.json").write_text('{"1": "nucleus"}')


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """What pages speak of: the nuclei model and its image, `my_data` of two classes, `cells` with instances."""
    root = tmp_path_factory.mktemp("pages")
    make_folder(root)
    write_cells(root)
    make_package(root, version=2)
    return root


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A copy of the folder as the working directory; what a page registers or imports is gone after it."""
    registries = [*REGISTRIES.values(), METRICS, LAYOUTS]
    before = [dict(registry) for registry in registries]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)
    forget_modules(tmp_path)


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=lambda page: page.stem)
def test_page_runs(page, here):
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    run_page(page, RUN.get(page.stem, ()))


def test_links_and_files_are_there():
    for page in GUIDES.glob("*.md"):
        text = page.read_text()
        assert [place for place in links(text) if not (GUIDES / place).exists()] == [], page
        named = re.findall(r"`((?:examples|docs|tests|src|benchmarks|model_cards)/[\w./-]*)`", text)
        assert [name for name in named if not (ROOT / name).exists()] == [], page
        assert any(block.language in ("python", "bash") for block in blocks(text)), page


class TestHarness:
    """A page that says what does not hold is found out."""

    @pytest.mark.parametrize(
        "page",
        [
            "```python\nprint(1)\n```\n```text\n2\n```",
            "```python\n1 / 0\n```",
            "```python\n1 / 0\n```\n```text\nValueError: no\n```",
            "```bash\nmaskcls validate cells --splitt train\n```",
            "```bash\nmaskcls segment a.png --model m --out o --threshold 2\n```",
            "```bash\nmaskcls evaluate --model m\n```",
            "```bash\nmaskcls train --recipe finetune --data d --out o\n```",
            "```bash\nmaskcls train --recipe camvid --data d --out o --set model.querys=3\n```",
            "```bash\naccelerate launch --processes 2 examples/train_trainer.py\n```",
            "```bash\ntorchrun -m maskcls_command train --recipe no_such --data d --out o\n```",
            "```bash\npython examples/no_such.py\n```",
            "```bash\npip install 'maskcls-hf[nothing]'\n```",
            "```bash\nmaskcls validate cells\n```\n```text\n3 errors\n```",
            "```bash\nrm -r cells\n```",
        ],
    )
    def test_wrong(self, page, here):
        Path("page.md").write_text(page)
        with pytest.raises((AssertionError, ZeroDivisionError)):
            run_page(Path("page.md"))

    def test_right(self, here):
        page = (
            '```python title="one.py"\nnumber = 1\n```\n```python\nfrom one import number\nprint(number)\n```\n'
            "```text\n1\n```\n```python\nnumber / 0\n```\n```text\nZeroDivisionError: ...\n```\n"
            "```bash\n# of which\nHF_HUB_OFFLINE=1 maskcls validate cells \\\n    --limit 1\n```\n"
            "```text\ncells: ...\n```\n"
        )
        Path("page.md").write_text(page)
        assert run_page(Path("page.md"))["number"] == 1
        with pytest.raises(AssertionError, match="has no commands"):
            run_page(Path("page.md"), ["maskcls tune"])
