"""The examples run; the demo with its real photograph and a tiny random checkpoint."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoints import picture, save_maskcls

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_maskcls(tmp_path_factory.mktemp("checkpoint"))


def run(name: str, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_demo(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mahotas")
    run("demo.py", monkeypatch, checkpoint, tmp_path / "demo")
    assert "Segments" in capsys.readouterr().out
    content = json.loads((tmp_path / "demo" / "segments.json").read_text())
    ids = np.asarray(Image.open(tmp_path / "demo" / "map.png")).astype(int) @ [1, 256, 65536]
    assert set(np.unique(ids)) - {0} == {record["id"] for record in content["annotations"][0]["segments_info"]}
    with Image.open(tmp_path / "demo" / "overlay.png") as overlay:
        assert min(overlay.size) >= 256


def test_demo_without_checkpoint(tmp_path, monkeypatch):
    pytest.importorskip("mahotas")
    with pytest.raises(SystemExit, match="No checkpoint"):
        run("demo.py", monkeypatch, tmp_path, tmp_path / "demo")


def test_segment_image(checkpoint, tmp_path, monkeypatch):
    picture().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    run("segment_image.py", monkeypatch, "image.png", checkpoint)
    with Image.open("segments.png") as written:
        assert written.size == picture().size
