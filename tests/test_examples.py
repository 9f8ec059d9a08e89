"""The examples run; the demo with its real image and a tiny random checkpoint."""

import ast
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from checkpoints import picture, save_maskcls
from maskcls_hf import training
from maskcls_hf.cli.main import app
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import Segments
from maskcls_hf.models.post_processing import PlainMaps, ResizeGeometry
from recipes import write_recipe
from test_data import write_semantic
from tiny import STAGES

EXAMPLES = Path(__file__).parents[1] / "examples"
FOUR_STAGES = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "out_features": STAGES,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_maskcls(tmp_path_factory.mktemp("checkpoint"))


def run(name: str, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["train_trainer.py", "train_accelerate.py"])
def test_trainings_use_what_the_package_exports(name):
    """And fit a screen."""
    source = (EXAMPLES / name).read_text()
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom | ast.Import)]
    of_package = [node for node in found if "maskcls_hf" in ast.unparse(node)]
    assert [node.module for node in of_package] == ["maskcls_hf.training"]
    assert {alias.name for node in of_package for alias in node.names} <= set(training.__all__)
    assert len(source.splitlines()) <= 80


def test_demo(checkpoint, tmp_path, monkeypatch, capsys):
    run("demo.py", monkeypatch, checkpoint, tmp_path / "demo")
    assert "Segments" in capsys.readouterr().out
    content = json.loads((tmp_path / "demo" / "segments.json").read_text())
    ids = np.asarray(Image.open(tmp_path / "demo" / "map.png")).astype(int) @ [1, 256, 65536]
    assert set(np.unique(ids)) - {0} == {record["id"] for record in content["annotations"][0]["segments_info"]}
    with Image.open(tmp_path / "demo" / "overlay.png") as overlay:
        assert min(overlay.size) >= 256


def test_demo_without_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="No checkpoint"):
        run("demo.py", monkeypatch, tmp_path, tmp_path / "demo")


def test_segment_image(checkpoint, tmp_path, monkeypatch):
    picture().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    run("segment_image.py", monkeypatch, "image.png", checkpoint)
    with Image.open("segments.png") as written:
        assert written.size == picture().size


@pytest.fixture
def study(monkeypatch):
    """Imports a study; what it would run in a process of its own runs here, and is counted in `started`."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    started = []

    def run_here(command, **options):
        started.append(command)
        assert command[1:3] == ["-m", "maskcls_hf.cli"]
        result = CliRunner().invoke(app, command[3:])
        assert result.exit_code == 0, result.output

    def load(name):
        subprocess = SimpleNamespace(run=run_here, STDOUT=None)  # others may start processes
        monkeypatch.setattr(importlib.import_module("studies"), "subprocess", subprocess)
        module = importlib.import_module(name)
        if hasattr(module, "subprocess"):
            monkeypatch.setattr(module, "subprocess", subprocess)
        module.started = started
        return module

    return load


def study_arguments(folder: Path, *changes: str, out: str = "out", **sections: dict) -> list[str]:
    """Of a study with tiny data and a training of one step."""
    if not (folder / "data").is_dir():
        for split in ("train", "val"):
            write_semantic(folder / "data", ((40, 48), (36, 40), (40, 40)), split)
    changes = ("schedule.max_steps=1", "evaluation.every_steps=null", "evaluation.tasks=[semantic]", *changes)
    arguments = ["--recipe", str(write_recipe(folder, **sections)), "--data", str(folder / "data")]
    return [*arguments, "--out", str(folder / out), *(part for change in changes for part in ("--set", change))]


def test_compare_families(study, tmp_path, capsys):
    families = study("compare_families")
    small = f"model.backbone_config={json.dumps(FOUR_STAGES)}"
    arguments = study_arguments(tmp_path, "image_processor.size_divisor=32", "augmentation.crop_size=32", small)
    scores = families.main(arguments)
    assert list(scores) == ["MaskFormer", "Mask2Former", "EoMT, ViT from scratch"]
    configs = [json.loads((tmp_path / "out" / f"{m.folder}/config.json").read_text()) for m in families.METHODS]
    assert [config["transformer_decoder"] for config in configs[:2]] == ["standard", "masked_attention"]
    assert configs[2]["architecture"] == "encoder_only" and len(configs[2]["mask_probabilities"]) == 3
    table = (tmp_path / "out" / "families.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert all(f"{100 * of_model['mean_iou']:.1f} (" in table for of_model in scores.values())
    assert len(families.started) == 6  # a training and an evaluation each
    assert families.main(arguments) == scores and len(families.started) == 6


class TestCompare:
    def test_table_plot_and_numbers(self, study, tmp_path, capsys):
        compare, arguments = study("compare"), study_arguments(tmp_path)
        summary = compare.main(arguments)
        assert list(summary) == ["per_pixel", "per_pixel_plus", "fixed", "bipartite_k", "bipartite_100"]
        assert all(0 <= score <= 100 for scores in summary.values() for score in scores.values())
        queries = {
            name: json.loads((tmp_path / "out" / f"{name}-0" / "config.json").read_text())["num_queries"]
            for name in ("fixed", "bipartite_k", "bipartite_100")
        }
        assert queries == {"fixed": 2, "bipartite_k": 2, "bipartite_100": 100}
        table = (tmp_path / "out" / "comparison.md").read_text()
        assert f"{summary['fixed']['mean_iou']:.1f} (" in table and table in capsys.readouterr().out
        with Image.open(tmp_path / "out" / "comparison.png") as picture:
            assert picture.width > 500
        assert len(compare.started) == 5
        assert compare.main(arguments) == summary
        assert len(compare.started) == 5  # nothing is trained twice

    def test_scores_of_all_images_are_those_of_the_metrics(self, study, tmp_path):
        studies = study("studies")
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        metrics = studies.new_metrics(data)
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randint(3, data[i]["image"].shape[-2:], generator=generator) for i in range(len(data))]
        maps = [torch.where(found == 2, data.void_id, found) for found in maps]  # some pixels of no class
        for sample, found in zip(data, maps, strict=True):
            truth = sample["segments"]
            segments = [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]
            metrics["mean_iou"].add(metrics["mean_iou"].measure(found, truth)[None])
            ids = torch.tensor([1, 2, 0])[found.clamp(max=2)]
            panoptic = Segments.from_output({"segmentation": ids, "segments_info": segments})
            metrics["pq"].add(metrics["pq"].measure(panoptic, truth)[None])
        remaining = iter(maps)
        measured = studies.measure(tmp_path / "test.npz", data, lambda image: next(remaining))
        scores = studies.scores_of([measured], data)
        for name in metrics:
            assert scores[name][0] == pytest.approx(100 * metrics[name].compute()[name])
            assert scores[name].shape == (1 + studies.REPLICATES,)

    def test_bad_arguments(self, study, tmp_path, capsys):
        compare = study("compare")
        with pytest.raises(SystemExit):
            compare.main(["--recipe", "no_such", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
        assert "No recipe 'no_such'" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            compare.main(["--recipe", "camvid", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
        assert f"{tmp_path / 'none'}" in capsys.readouterr().err


class TestAblate:
    METHODS = ("base", "fixed", "layers_1", "general")

    def test_finished_runs_are_kept(self, study, tmp_path, capsys):
        ablate = study("ablate")
        results = ["--results", str(tmp_path / "kept" / "ablation.json"), "--only"]
        found = ablate.main([*study_arguments(tmp_path), *results, *self.METHODS])
        assert list(found) == ["fixed", "base", "layers_1", "general"]
        assert len(ablate.started) == 3  # general inference is with the base model
        table = (tmp_path / "kept" / "ablation.md").read_text()
        assert f"{found['layers_1']['mean_iou'][0]:.1f} (" in table and table in capsys.readouterr().out
        assert "Not run yet: N = 20; N = 50; N = 200." in table
        assert (tmp_path / "kept" / "ablation.png").is_file()
        config = json.loads((tmp_path / "out" / "layers_1" / "config.json").read_text())
        assert (config["decoder_layers"], config["num_queries"], config["matching"]) == (1, 100, "bipartite")

        elsewhere = study_arguments(tmp_path, out="elsewhere")  # where nothing is trained yet
        again = ablate.main([*elsewhere, *results, *self.METHODS, "no_deep_supervision"])
        assert len(ablate.started) == 4
        assert again.pop("no_deep_supervision")["pq"].shape == (1 + ablate.RESAMPLES,)
        assert list(again) == list(found)
        content = json.loads((tmp_path / "kept" / "ablation.json").read_text())
        assert "queries_20" in content["missing"] and "no_deep_supervision" not in content["missing"]
        with pytest.raises(SystemExit):
            ablate.main([*study_arguments(tmp_path, "training.seed=3"), *results, "base"])
        assert "training.seed=3" in capsys.readouterr().err

    def test_a_method_that_the_package_lacks(self, study, tmp_path, monkeypatch, capsys):
        ablate = study("ablate")
        unknown = ablate.variant("unknown", "unknown", "model.matching=no_such")
        monkeypatch.setattr(ablate, "METHODS", (ablate.base, unknown))
        with pytest.raises(SystemExit):
            ablate.main(study_arguments(tmp_path))
        assert "matching='no_such'" in (error := capsys.readouterr().err) and "--only" in error
        assert not ablate.started

    def test_general_inference(self, study, checkpoint):
        ablate = study("ablate")
        predictor = Predictor.from_pretrained(checkpoint)
        image = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
        outputs = predictor._outputs([image])
        class_logits, mask_logits = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
        sizes = outputs.padded_sizes[0], outputs.valid_sizes[0], image.shape[-2:]
        maps = PlainMaps(ResizeGeometry.checked(mask_logits, *sizes))
        scores, labels = class_logits.softmax(-1).max(-1)
        queries = (labels < class_logits.shape[-1] - 1).nonzero()[:, 0]
        winners, *_ = maps.assign_pixels(scores[queries], mask_logits[queries], mask_logit=0.0)
        expected = labels[queries][winners]
        assert len(expected.unique()) > 1
        found = ablate.general_map_of(checkpoint, 255)(image)
        assert (found == expected).float().mean() > 0.999  # ties by rounding
        assert (found != predictor(image, task="semantic")["segmentation"]).any()


class TestConvertPerPixel:
    def test_table_plot_and_numbers(self, study, tmp_path, capsys):
        convert_per_pixel = study("convert_per_pixel")
        arguments = study_arguments(tmp_path, "training.ema_decay=null", model={"backbone_config": FOUR_STAGES})
        arguments += ["--set", "image_processor.size_divisor=4", "--architecture", "upernet"]
        summary = convert_per_pixel.main(arguments)
        assert [key.split("/")[1] for key in summary] == [m.folder for m in convert_per_pixel.METHODS]
        content = json.loads((tmp_path / "out" / "conversion.json").read_text())
        assert content["unchanged_pixels"]["upernet"] > 0.99  # before any training
        assert summary["upernet/converted"] == pytest.approx(summary["upernet/per_pixel"], abs=2)
        configs = [
            json.loads((tmp_path / "out" / "upernet" / name / "config.json").read_text())
            for name in ("per_pixel_on", "fixed_on", "bipartite_on")
        ]
        assert [config["model_type"] for config in configs] == ["upernet", "maskcls", "maskcls"]
        assert [config.get("matching") for config in configs] == [None, "fixed", "bipartite"]
        table = (tmp_path / "out" / "conversion.md").read_text()
        assert f"{summary['upernet/fixed_on']['mean_iou']:.1f} (" in table and table in capsys.readouterr().out
        weights = tmp_path / "out" / "upernet" / "fixed_on" / "model.safetensors"
        written = weights.stat().st_mtime_ns
        assert convert_per_pixel.main(arguments) == summary
        assert weights.stat().st_mtime_ns == written  # nothing is trained twice
