"""The examples run; the demo with its real photograph and a tiny random checkpoint."""

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
from maskcls_hf.cli.main import app
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.metrics import GroundTruth
from recipes import write_recipe
from test_data import write_semantic

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


class TestCompare:
    """Five tiny trainings in this process; the command line that compare.py builds is what runs."""

    @pytest.fixture
    def compare(self, monkeypatch):
        pytest.importorskip("matplotlib")
        monkeypatch.syspath_prepend(str(EXAMPLES))
        module = importlib.import_module("compare")
        started = []

        def run_here(command, **options):
            started.append(command)
            assert command[1:3] == ["-m", "maskcls_hf.cli"]
            result = CliRunner().invoke(app, command[3:])
            assert result.exit_code == 0, result.output

        monkeypatch.setattr(
            module, "subprocess", SimpleNamespace(run=run_here, STDOUT=None)
        )  # others may start processes
        module.started = started
        return module

    def test_table_plot_and_numbers(self, compare, tmp_path, capsys):
        for split in ("train", "val"):
            write_semantic(tmp_path / "data", ((40, 48), (36, 40), (40, 40)), split)
        changes = ["schedule.max_steps=1", "evaluation.every_steps=null", "evaluation.tasks=[semantic]"]
        arguments = ["--recipe", str(write_recipe(tmp_path)), "--data", str(tmp_path / "data")]
        arguments += ["--out", str(tmp_path / "out"), *(part for change in changes for part in ("--set", change))]
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

    def test_scores_of_all_images_are_those_of_the_metrics(self, compare, tmp_path):
        data = SegmentationFolder(write_semantic(tmp_path), "train")
        metrics = compare.new_metrics(data)
        rows = {name: [] for name in metrics}
        generator = torch.Generator().manual_seed(0)
        for sample in data:
            truth = GroundTruth.from_sample(sample, data.void_id)
            classes = torch.randint(2, truth.size, generator=generator)
            segments = [{"id": label, "label_id": label} for label in classes.unique().tolist()]
            rows["mean_iou"].append(metrics["mean_iou"].measure(classes, truth))
            rows["pq"].append(metrics["pq"].measure(classes, segments, truth))
        measurements = {name: torch.stack(values).numpy() for name, values in rows.items()}
        scores = compare.replicates([measurements], data)
        for name in compare.SCORES:
            metrics[name].add(torch.stack(rows[name]))
            assert scores[name][0] == pytest.approx(100 * metrics[name].compute()[name])
            assert scores[name].shape == (1 + compare.REPLICATES,)

    def test_bad_arguments(self, compare, tmp_path, capsys):
        with pytest.raises(SystemExit):
            compare.main(["--recipe", "no_such", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
        assert "No recipe 'no_such'" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="--data"):
            compare.main(["--recipe", "camvid", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
