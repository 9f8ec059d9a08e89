"""A layout from outside of the package: one class and one line, and everything that takes a layout's name knows it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import maskcls_hf.data
from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.data import (
    VOID,
    MaskClsCollator,
    SegmentationDataset,
    SegmentationFolder,
    Segments,
    layouts,
    open_dataset,
    register_layout,
)
from maskcls_hf.data.validation import validate_dataset
from maskcls_hf.training.recipe import load_recipe
from maskcls_hf.training.run import open_splits
from recipes import write_recipe
from samples import id_map
from test_data import write_semantic


class Arrays(SegmentationDataset):
    """ROOT/SPLIT.arrays/NAME.png with NAME.npy: ids of cells, 0 for none, -1 for unlabeled; other negative ids are
    crowds."""

    def __init__(self, root, split, *, name="cell", cache=False, report=None):
        super().__init__({7: name}, "instance", cache=cache)
        self.images = sorted((Path(root) / f"{split}.arrays").glob("*.png"))
        self.names = [path.stem for path in self.images]

    @classmethod
    def find(cls, root, split, options):
        return (root / f"{split}.arrays").is_dir()

    @classmethod
    def splits(cls, root, options):
        return [path.stem for path in root.glob("*.arrays")]

    def image_path(self, index):
        return self.images[index]

    def annotation(self, index):
        return str(self.images[index].with_suffix(".npy"))

    def read(self, index, size):
        ids = np.load(self.annotation(index))
        classes = {i: VOID if i == -1 else None if i == 0 else 0 for i in np.unique(ids).tolist()}
        return Segments.from_ids(ids, classes, [i for i in classes if i < -1])


class Stacks(Arrays):
    """The same, as overlapping masks."""

    def read(self, index, size):
        ids = torch.from_numpy(np.load(self.annotation(index)))
        found = [i for i in ids.unique().tolist() if i]
        classes = {place: VOID if i == -1 else 0 for place, i in enumerate(found)}
        return Segments.from_ids(
            torch.stack([ids == i for i in found]), classes, [found.index(i) for i in found if i < -1]
        )


@pytest.fixture
def arrays(tmp_path) -> Path:
    for split, count in (("train", 2), ("val", 1)):
        folder = tmp_path / f"{split}.arrays"
        folder.mkdir()
        for number in range(count):
            ids = np.zeros((32, 48), dtype=np.int32)
            ids[2:10, 2:10], ids[12:20, 12:24], ids[30:], ids[:, 40:] = 1, 2, -1, -5
            np.save(folder / f"{number}.npy", ids)
            pixels = np.random.default_rng([len(split), number]).integers(0, 255, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def _as_before():
    before = dict(layouts.LAYOUTS)
    yield
    layouts.LAYOUTS.clear()
    layouts.LAYOUTS.update(before)


@pytest.fixture(params=[Arrays, Stacks])
def registered(request):
    register_layout("arrays", request.param)
    return request.param


class TestLayoutOfYourOwn:
    def test_is_opened_by_name_and_by_looking(self, arrays, registered):
        for data in (open_dataset(arrays, "train", "arrays"), open_dataset(arrays, "train")):
            assert type(data) is registered and len(data) == 2 and data.id2label == {0: "cell"}
        assert open_dataset(arrays, "train", name="nucleus").id2label == {0: "nucleus"}
        batch = MaskClsCollator(MaskClsImageProcessor(**data.processor_fields()), do_resize=False)([data[0], data[1]])
        assert [mask.flatten(1).sum(1).tolist() for mask in batch["mask_labels"]] == [[64, 96]] * 2
        assert batch["void_mask"].sum() == 2 * (32 * 8 + 2 * 40)

    def test_is_validated(self, arrays, registered):
        report = validate_dataset(arrays, workers=1, num_queries=2, size={"height": 32, "width": 48})
        assert (report.layout, report.kind, report.ok) == ("arrays", "instance", True), report.findings
        assert {finding.kind for finding in report.findings} == {"crowd"}
        train, val = report.splits
        assert (train.name, train.images, train.labels, train.checked, val.images) == ("train", 2, 2, 2, 1)
        assert (train.segments, train.crowds, train.void_pixels) == ([3, 3], 2, 2 * 2 * 40)
        assert report.class_names == {7: "cell"} and vars(train.classes[7]) == {
            "images": 2, "segments": 6, "pixels": 2 * (64 + 96 + 8 * 32),
        }  # fmt: skip

    def test_faults_are_found_and_the_check_goes_on(self, arrays, registered):
        np.save(arrays / "train.arrays/0.npy", np.ones((32, 50), dtype=np.int32))
        (arrays / "val.arrays/0.npy").unlink()
        (arrays / "train.arrays/1.png").write_bytes(b"")
        report = validate_dataset(arrays, workers=1)
        found = {(finding.kind, finding.file) for finding in report.findings if finding.severity == "error"}
        assert found == {
            ("size_mismatch", "train.arrays/0.png"), ("unreadable_label", "val.arrays/0.png"),
            ("unreadable_image", "train.arrays/1.png"),
        }  # fmt: skip
        assert "50 x 32" in next(f.message for f in report.findings if f.kind == "size_mismatch")
        assert [split.checked for split in report.splits] == [2, 1]

    def test_one_that_takes_no_part_in_checks_is_still_told(self, arrays, registered):
        finding = validate_dataset(arrays, workers=1, options={"number": 3}).findings[0]
        assert finding.kind == "reader_refuses" and "no option number; it has name" in finding.message

    def test_recipes_and_the_command_take_its_name(self, arrays, registered, tmp_path_factory):
        data = {"layout": "arrays", "train_split": "train", "eval_split": "val", "options": {"name": "nucleus"}}
        recipe = write_recipe(tmp_path_factory.mktemp("recipe"), data=data)
        train, val = open_splits(load_recipe(recipe), arrays)
        assert type(train) is registered and (len(train), len(val)) == (2, 1)
        for options in (["--layout", "arrays"], ["--recipe", str(recipe)], []):
            result = CliRunner().invoke(app, ["validate", str(arrays), *options])
            assert result.exit_code == 0 and "layout arrays" in " ".join(result.stdout.split()), result.output

    def test_an_unknown_folder_still_says_what_was_looked_for(self, tmp_path, registered):
        with pytest.raises(FileNotFoundError, match=r"(?s)coco_panoptic: train/panoptic\.json"):
            open_dataset(tmp_path, "train")


def test_the_example_of_the_documentation_works(tmp_path):
    example = textwrap.dedent((SegmentationDataset.__doc__ or "").split("Example::")[1])
    exec(example, {name: getattr(maskcls_hf.data, name) for name in maskcls_hf.data.__all__} | {
        "Path": Path, "np": np, "torch": torch,
    })  # fmt: skip
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (6, 4), (len(split), 0, 0)).save(tmp_path / split / "a.png")
        np.save(tmp_path / split / "a.npy", np.array([[0, 1, 1, 0, 255, 255]] * 4, dtype=np.uint8))
    assert id_map(open_dataset(tmp_path, "val")[0]).unique().tolist() == [0, 1, 255]
    assert validate_dataset(tmp_path / "val", workers=1).findings[0].kind == "unknown_layout"
    report = validate_dataset(tmp_path, workers=1)
    assert report.layout == "pairs" and report.ok and {f.kind for f in report.findings} == {"tiny_segment"}
    assert [(split.name, split.images, split.segments, split.void_pixels) for split in report.splits] == [
        ("train", 1, [2], 8), ("val", 1, [2], 8),
    ]  # fmt: skip


class TestRegistering:
    def test_built_in_ones_are_registered_alike_and_cannot_be_replaced(self, tmp_path):
        assert layouts.LAYOUTS["folder"] is SegmentationFolder
        for name in list(layouts.LAYOUTS):
            with pytest.raises(ValueError, match=rf"layout .{name}. is maskcls_hf\.data\.layouts\..*: take another"):
                register_layout(name, Arrays)
        assert type(open_dataset(write_semantic(tmp_path), "train")) is SegmentationFolder

    def test_a_name_is_of_one_class(self, arrays):
        register_layout("arrays", Arrays)
        register_layout("arrays", Arrays)
        with pytest.raises(ValueError, match=r"layout 'arrays' is test_layouts\.Arrays: take another name"):
            register_layout("arrays", Stacks)
        assert type(open_dataset(arrays, "train", "arrays")) is Arrays

    @pytest.mark.parametrize("name", ["", "my layout", "a/b", 3, None])
    def test_names(self, name):
        with pytest.raises(ValueError, match="layout: a name is letters, digits and underscores"):
            register_layout(name, Arrays)

    @pytest.mark.parametrize("layout", [None, "Arrays", dict, lambda root, split: None])
    def test_classes(self, layout):
        with pytest.raises(TypeError, match=r"Layout 'mine': .* is no subclass of maskcls_hf\.data\.Segm"):
            register_layout("mine", layout)

    def test_an_unknown_one_lists_all(self, tmp_path):
        register_layout("arrays", Arrays)
        tools = "yolo, cvat, label_studio, supervisely, voc, geo, mask_files, object_folders, color_maps"
        known = f"{tools}, cityscapes, ade20k, coco_panoptic, labelme, folder, coco_instances, arrays"
        with pytest.raises(ValueError, match=f"layout='nowhere': the layouts are {known}"):
            open_dataset(tmp_path, "train", "nowhere")
        with pytest.raises(ValueError, match=f"layout='nowhere': the layouts are {known}"):
            validate_dataset(tmp_path, layout="nowhere")
        result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["validate", str(tmp_path), "--layout", "nowhere"])
        assert result.exit_code == 2 and known in result.output


def test_it_is_exported_and_works_from_another_file(arrays, tmp_path_factory):
    assert maskcls_hf.register_layout is register_layout
    script = tmp_path_factory.mktemp("outside") / "mine.py"
    lines = (Path(__file__).read_text().split("class Stacks")[0]).split("class Arrays")[1]
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport json\nimport numpy as np\nimport torch\n"
        "from maskcls_hf import register_layout\n"
        "from maskcls_hf.data import VOID, SegmentationDataset, Segments, open_dataset\n"
        "from maskcls_hf.data.validation import validate_dataset\n"
        f"class Arrays{lines}"
        "register_layout('arrays', Arrays)\n"
        "report = validate_dataset(sys.argv[1], layout='arrays')\n"
        "print(json.dumps([len(open_dataset(sys.argv[1], 'val', 'arrays')), report.layout, report.ok]))\n"
    )
    done = subprocess.run([sys.executable, script, arrays], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [1, "arrays", True]
