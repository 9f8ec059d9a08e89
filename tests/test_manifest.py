"""Checkpoints are verified by their manifest, whatever became of it, wherever they are loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from checkpoints import save_maskcls
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.hub.saved_model import SavedModel
from maskcls_hf.inference.predictor import Predictor
from maskcls_hf.models.checkpoint_manifest import MANIFEST, DamagedCheckpoint, require_whole, verify
from maskcls_hf.training.build import load_model
from maskcls_hf.training.checkpoints import last_good_checkpoint, saving
from maskcls_hf.training.recipe import load_recipe
from recipes import write_recipe
from test_checkpoints import write

SHA = "0" * 64
ENTRY = {"bytes": 8, "sha256": SHA}
SHAPES = {
    "a list": [],
    "null": None,
    "a number": 3,
    "no files": {},
    "files is null": {"files": None},
    "files is a list": {"files": [ENTRY]},
    "files is text": {"files": "weights"},
    "no file": {"files": {}},
    "an entry is null": {"files": {"weights": None}},
    "an entry is a list": {"files": {"weights": [8, SHA]}},
    "no bytes": {"files": {"weights": {"sha256": SHA}}},
    "negative bytes": {"files": {"weights": {"bytes": -8, "sha256": SHA}}},
    "bytes is a bool": {"files": {"weights": {"bytes": True, "sha256": SHA}}},
    "bytes is text": {"files": {"weights": {"bytes": "8", "sha256": SHA}}},
    "no sha256": {"files": {"weights": {"bytes": 8}}},
    "sha256 is a number": {"files": {"weights": {"bytes": 8, "sha256": 3}}},
    "sha256 is short": {"files": {"weights": {"bytes": 8, "sha256": "00"}}},
    "a file outside": {"files": {"../checkpoint-1/weights": ENTRY}},
    "an absolute path": {"files": {"/etc/hostname": ENTRY}},
    "a path of Windows": {"files": {"..\\weights": ENTRY}},
    "a name with NUL": {"files": {"a\0b": ENTRY}},
    "an empty name": {"files": {"": ENTRY}},
}
TEXTS = {
    "empty": "",
    "cut off": '{"files": {"weights"',
    "nested": "[" * 100_000,
    "twice": f'{{"files": {{"weights": {json.dumps(ENTRY)}, "weights": {json.dumps(ENTRY)}}}}}',
    "a long number": '{"files": {"weights": {"bytes": ' + "9" * 5000 + "}}}",
}


class TestDamagedManifest:
    @pytest.fixture
    def output(self, tmp_path) -> Path:
        write(tmp_path, 1)
        write(tmp_path, 2)
        return tmp_path

    def assert_named(self, output: Path, what: str = "manifest.json cannot be read") -> None:
        assert what in (verify(output / "checkpoint-2") or "")
        assert last_good_checkpoint(output) == output / "checkpoint-1"

    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_any_shape(self, shape, output):
        (output / "checkpoint-2" / MANIFEST).write_text(json.dumps(SHAPES[shape]))
        self.assert_named(output)

    @pytest.mark.parametrize("text", TEXTS)
    def test_of_any_text(self, text, output):
        (output / "checkpoint-2" / MANIFEST).write_text(TEXTS[text])
        self.assert_named(output)

    def test_a_folder_in_its_place(self, output):
        (output / "checkpoint-2" / MANIFEST).unlink()
        (output / "checkpoint-2" / MANIFEST).mkdir()
        self.assert_named(output)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_in_its_place(self, output):
        (output / "checkpoint-2" / MANIFEST).unlink()
        os.mkfifo(output / "checkpoint-2" / MANIFEST)
        self.assert_named(output)

    def test_any_flipped_bit(self, output):
        """Names the fault, or changes nothing that counts (white space)."""
        folder = output / "checkpoint-2"
        content = (folder / MANIFEST).read_bytes()
        whole = 0
        for place in range(len(content)):
            for bit in (0, 3, 5):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                (folder / MANIFEST).write_bytes(changed)
                problem = verify(folder)
                if problem is None:
                    whole += 1
                    assert content[place : place + 1].isspace()
        assert whole < 0.02 * 3 * len(content)

    @pytest.mark.parametrize(
        ("name", "is_loaded"),
        [
            ("model.safetensors", True),
            ("custom_checkpoint_7.pkl", True),
            ("sub/.metadata", True),
            ("sub/x.distcp", True),
        ]
        + [("adapter_config.json", True), ("notes.txt", False), ("README.md", False), ("eval.json", False)],
    )
    def test_files_that_it_does_not_list(self, name, is_loaded, output):
        (output / "checkpoint-2" / name).write_text("mine")
        if is_loaded:
            self.assert_named(output, f"{name} is not in manifest.json, but would be loaded")
        else:
            assert verify(output / "checkpoint-2") is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of a Trainer, as far as loading a model goes."""
    final = tmp_path_factory.mktemp("run") / "checkpoint-5"
    with saving(final) as folder:
        save_maskcls(folder)
        (folder / "optimizer.pt").write_bytes(b"states")
    return final


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


LOADERS = {
    "model": MaskClsForUniversalSegmentation.from_pretrained,
    "subfolder": lambda folder: MaskClsForUniversalSegmentation.from_pretrained(folder.parent, subfolder=folder.name),
    "predictor": Predictor.from_pretrained,
    "push": SavedModel,
    "fine-tuning": lambda folder: load_model(load_recipe(write_recipe(folder.parent)), folder, {0: "a", 1: "b"}),
    "backbone": MaskClsForUniversalSegmentation.from_backbone,
}


class TestWhereverItIsLoaded:
    @pytest.mark.parametrize("name", LOADERS)
    def test_damaged_weights(self, name, saved, tmp_path):
        folder = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
        if name != "backbone":
            LOADERS[name](folder)
        flip(folder / "model.safetensors")
        with pytest.raises(DamagedCheckpoint, match=r"checkpoint-5 is damaged: the bytes of model.safetensors have"):
            LOADERS[name](folder)

    @pytest.mark.parametrize("load", [MaskClsImageProcessor.from_pretrained, Predictor.from_pretrained, SavedModel])
    def test_damaged_options_of_the_image_processor(self, load, saved, tmp_path):
        folder = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
        path = folder / "preprocessor_config.json"
        path.write_text(path.read_text().replace("128", "127"))
        with pytest.raises(DamagedCheckpoint, match="preprocessor_config.json have changed"):
            load(folder)

    def test_weights_that_it_does_not_list(self, saved, tmp_path):
        folder = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
        (folder / "pytorch_model.bin").write_bytes(b"other")
        with pytest.raises(DamagedCheckpoint, match="pytorch_model.bin is not in manifest.json"):
            MaskClsForUniversalSegmentation.from_pretrained(folder)

    def test_states_of_the_optimizer_do_not_count_for_a_model(self, saved, tmp_path):
        folder = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
        (folder / "optimizer.pt").unlink()
        MaskClsForUniversalSegmentation.from_pretrained(folder)
        assert verify(folder) == "optimizer.pt is missing"

    def test_without_a_manifest(self, saved, tmp_path):
        folder = Path(shutil.copytree(saved, tmp_path / "checkpoint-5"))
        (folder / MANIFEST).unlink()
        MaskClsForUniversalSegmentation.from_pretrained(folder)
        require_whole("a/name-on-the-hub")
        require_whole(None)
        os.symlink("nowhere", folder / MANIFEST)
        with pytest.raises(DamagedCheckpoint, match="manifest.json is missing"):
            require_whole(folder)
