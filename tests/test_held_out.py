"""Data without a validation split: images that a training holds out by itself."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.data import MaskClsCollator, open_dataset
from maskcls_hf.data.held_out import RECORD, divided, draw, open_evaluated, read_record
from maskcls_hf.data.validation.occurrence import classes_in
from maskcls_hf.training import load_recipe, prepare
from maskcls_hf.training import run as run_module
from recipes import write_recipe
from test_data import write_instances, write_semantic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train_accelerate
import train_trainer

NAMES = [f"image{number}" for number in range(10)]


@pytest.fixture
def messages(caplog, monkeypatch):
    monkeypatch.setattr(run_module.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.message for record in caplog.records if "held out" in record.message]


def prepared(folder: Path, data: Path, *changes: str, **options):
    return prepare(load_recipe(write_recipe(folder / "recipe"), changes), data, **options)


def without_splits(data: Path) -> Path:
    """The files of train in the folder of the data itself."""
    for path in (data / "train").iterdir():
        path.rename(data / path.name)
    (data / "train").rmdir()
    return data


class TestDraw:
    @pytest.mark.parametrize(("images", "share", "number"), [(10, 0.1, 1), (10, 0.25, 2), (2, 0.01, 1), (100, 0.3, 30)])
    def test_the_share_and_at_least_one(self, images, share, number):
        names = [str(name) for name in range(images)]
        chosen = draw(names, share, seed=3)
        assert len(chosen) == len(set(chosen)) == number and set(chosen) < set(names)

    def test_a_function_of_names_and_seed(self):
        assert draw(NAMES, 0.5, 1) == draw(NAMES[::-1], 0.5, 1) == draw([*NAMES, *NAMES], 0.5, 1)
        assert len({tuple(draw(NAMES, 0.5, seed)) for seed in range(5)}) == 5

    def test_copies_of_one_image_stay_together(self):
        names = [f"{image}_jpg.rf.{copy}" for image in "abcd" for copy in ("0a1b", "2c3d", "4e5f")]
        held_out = draw(names, 0.25, 0)
        assert len(held_out) == 3 and len({name[0] for name in held_out}) == 1

    @pytest.mark.parametrize(("images", "share"), [(1, 0.1), (0, 0.1), (3, 0.9)])
    def test_too_few(self, images, share):
        with pytest.raises(ValueError, match=f"of {images} labeled images"):
            draw(NAMES[:images], share, 0)


class TestParts:
    @pytest.mark.parametrize("kind", ["instances", "labels"])
    def test_they_are_the_data_set(self, tmp_path, kind):
        write = write_instances if kind == "instances" else write_semantic
        data = open_dataset(write(tmp_path), "train")
        collator = MaskClsCollator(MaskClsImageProcessor(**data.processor_fields()))
        rest, out = divided(data, [data.names[1]])
        assert (rest.names, out.names) == ([name for name in data.names if name != data.names[1]], [data.names[1]])
        assert (len(rest), len(out)) == (len(data) - 1, 1)
        for part in (rest, out):
            assert (part.id2label, part.stuff_ids, part.kind) == (data.id2label, data.stuff_ids, data.kind)
            assert part.processor_fields() == data.processor_fields()
            assert len(part.sizes()) == len(part)
            for index, name in enumerate(part.names):
                whole = data.names.index(name)
                sample, expected = part[index], data[whole]
                assert part.image_path(index).stem == name
                batch, whole_batch = collator([sample]), collator([expected])
                assert batch["pixel_values"].equal(whole_batch["pixel_values"])
                assert batch["mask_labels"][0].equal(whole_batch["mask_labels"][0])
                assert classes_in(part, index) == classes_in(data, whole) == {0, 1}
                assert part.sizes()[index] == data.sizes()[whole]
                assert part.image_path(index) == data.image_path(whole)
                assert part.annotation(index) == data.annotation(whole)
                assert part.raw_map(index).equal(data.raw_map(whole))
        with pytest.raises(IndexError):
            rest[len(rest)]

    def test_images_that_are_gone(self, tmp_path):
        data = open_dataset(write_instances(tmp_path), "train")
        with pytest.raises(ValueError, match="1 of the 2 images that this training holds out are not in the data any"):
            divided(data, ["image0", "image9"])


class TestPrepare:
    def test_images_are_held_out_and_said(self, tmp_path, messages):
        data = write_instances(tmp_path / "data", count=10)
        run = prepared(tmp_path, data, "data.val_share=0.2")
        assert messages() == [
            f"{data} has no split val: 2 of its 10 images are held out for evaluation (data.val_share=0.2, chosen by "
            "training.seed=0), 8 are trained on."
        ]
        assert run.held_out == draw(NAMES, 0.2, 0) == run.eval_data.names
        assert sorted([*run.held_out, *run.train_data.dataset.names]) == NAMES
        assert "8 images for training, 2 for evaluation" in run.describe()
        assert prepared(tmp_path, data).held_out == draw(NAMES, 0.1, 0)  # one
        assert prepared(tmp_path, data, "training.seed=3", "data.val_share=0.5").held_out == draw(NAMES, 0.5, 3)

    def test_data_that_is_not_divided_at_all(self, tmp_path, messages):
        data = without_splits(write_instances(tmp_path / "data", count=10))
        run = prepared(tmp_path, data)
        assert (len(run.train_data), len(run.eval_data)) == (9, 1) and len(messages()) == 1

    def test_a_split_that_is_there_is_used(self, tmp_path, messages):
        data = write_instances(write_instances(tmp_path / "data", count=4), "val", count=3)
        run = prepared(tmp_path, data, "data.val_share=0.5")
        assert run.held_out is None and (len(run.train_data), len(run.eval_data)) == (4, 3) and not messages()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: (data / "val").mkdir(), "val"),  # a split by halves
            (lambda data: shutil.copytree(data / "train/images", data / "val/images"), "instances"),
            (
                lambda data: shutil.copytree(data / "train", data / "validation"),
                "has no split val, but validation: --set data.eval_split=validation",
            ),
            (
                lambda data: [p.unlink() for p in (data / "train").glob("*/image[1-9].png")],
                "of 1 labeled images 1 cannot",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, change, message):
        data = write_instances(tmp_path / "data", count=10)
        change(data)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepared(tmp_path, data, "training.batch_size=1")

    def test_without_a_share_the_split_must_be_there(self, tmp_path):
        data = write_instances(tmp_path / "data", count=10)
        with pytest.raises(FileNotFoundError, match="split val"):
            prepared(tmp_path, data, "data.val_share=null")
        with pytest.raises(ValueError, match=r"data.val_share=1.0 must be between 0 and 1"):
            prepared(tmp_path, data, "data.val_share=1")


def arguments(recipe: Path, data: Path, out: Path, *options: str) -> list[str]:
    return [f"--recipe={recipe}", f"--data={data}", f"--out={out}", *options]


@pytest.mark.parametrize("script", [train_trainer, train_accelerate])
def test_a_resume_holds_out_the_same(tmp_path, script, messages):
    """Also of data that has grown, and with another seed: what was trained on is not evaluated later."""
    data, out = write_instances(tmp_path / "data", count=6), tmp_path / "out"
    recipe = write_recipe(tmp_path, schedule={"max_steps": 4}, evaluation={"every_steps": None})
    script.main(arguments(recipe, data, out))
    record = read_record(out)
    assert record == {"split": "val", "of": "train", "images": draw(NAMES[:6], 0.1, 0)}
    (more,) = write_instances(tmp_path / "more", count=10).glob("train")
    for path in more.glob("*/*.png"):
        path.replace(data / "train" / path.parent.name / path.name)
    assert draw(NAMES, 0.1, 7) != record["images"]
    script.main(arguments(recipe, data, out, "--resume", "--set=training.seed=7", "--set=schedule.max_steps=6"))
    assert read_record(out) == record
    assert "1 of its 10 images are held out for evaluation (as before), 9 are trained on" in messages()[-1]

    # What the model is evaluated on is what it has not seen.
    assert open_evaluated(data, "val", None, out).names == record["images"]
    scores = tmp_path / "scores.json"
    result = CliRunner().invoke(app, ["evaluate", f"--model={out}", f"--data={data}", f"--json={scores}"])
    assert result.exit_code == 0, result.output
    assert json.loads(scores.read_text())["settings"]["images"] == 1
    with pytest.raises(FileNotFoundError, match="split test"):
        open_evaluated(data, "test", None, out)

    (data / "train/images" / f"{record['images'][0]}.png").unlink()
    (data / "train/instances" / f"{record['images'][0]}.png").unlink()
    with pytest.raises(SystemExit, match="not in the data any more: " + record["images"][0]):
        script.main(arguments(recipe, data, out, "--resume"))
    (out / RECORD).write_text('{"images": 3}')
    with pytest.raises(SystemExit, match=f"{RECORD} does not name the images"):
        script.main(arguments(recipe, data, out, "--resume"))
