"""The snippets of the README run in their order, in a folder that holds what they speak of."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from checkpoints import picture, save_maskcls

README = Path(__file__).parents[1] / "README.md"


def snippets(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def make_folder(root: Path) -> None:
    """Two images a split, with labels and void."""
    save_maskcls(root / "model_cards" / "maskcls-nuclei-tiny")
    picture().save(root / "nuclei.png")
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


def test_snippets_run(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    code = snippets(README.read_text())
    assert len(code) == 7
    for number, snippet in enumerate(code, start=1):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
    assert names["model"].config.id2label == {0: "sky", 1: "lake"}
    assert (tmp_path / "runs" / "mine" / "final" / "modeling_maskcls.py").is_file()
    assert names["fresh"].config.num_labels == 2
    assert names["one_query_a_class"].config.num_queries == 2


def test_files_that_are_named_exist():
    named = re.findall(r"`((?:examples|docs|tests|model_cards)/[\w./-]*)`", README.read_text())
    assert named
    assert [name for name in named if not (README.parent / name).exists()] == []
