"""`benchmarks/inference_settings.py`: its tables, and what it saves."""

import sys
from pathlib import Path

import pytest
import torch

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from test_data import write_instances
from tiny import maskcls_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
settings = pytest.importorskip("inference_settings")


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    MaskClsForUniversalSegmentation(
        maskcls_config(num_queries=12, id2label={0: "background", 1: "square"})
    ).save_pretrained(folder)
    MaskClsImageProcessor(do_resize=False, inference_defaults={"overlap": 0.3}).save_pretrained(folder)
    return folder


@pytest.fixture
def table(model, tmp_path, monkeypatch, capsys):
    """The rows that the script prints."""
    data = write_instances(tmp_path / "data", "val", count=2)

    def run(*arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["settings", *arguments, "--model", str(model), "--data", str(data)])
        settings.main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]

    return run


def test_each_part_of_the_clean_up_has_a_row(table):
    rows = table("clean-up", "--option", "tile=40", "--option", "threshold=0.1")
    assert [row[0] for row in rows] == [
        "panoptic, as in the paper's code",
        "panoptic, max_hole_share 0.05",
        "panoptic, min_fragment_share 0.05",
        "panoptic, all of them",
        "instance, as in the paper's code",
        "instance, max_mask_iou 0.8",
        "instance, max_hole_share 0.05",
        "instance, min_fragment_share 0.05",
        "instance, all of them",
    ]
    found = {row[0]: int(row[-1]) for row in rows}
    assert found["instance, max_mask_iou 0.8"] < found["instance, as in the paper's code"]


def test_the_best_settings_are_saved(table, model, monkeypatch):
    """Where everything scores the same, the first stays."""
    scores = {"tile": {0: 0.1, 32: 0.3, 40: 0.2}, "threshold": {0.5: 0.0, 0.2: 0.4}}

    def of(trial, task, ways, options):
        f1 = scores["tile"][ways["tile"]] + scores["threshold"].get(options["threshold"], 0.0) + (task == "instance")
        return {"f1": f1, "things": 1}

    monkeypatch.setattr(settings.Trial, "scores", of)
    monkeypatch.setattr(settings, "GRID", {task: {"tile": (32, 40), "threshold": (0.2, 0.5)} for task in settings.GRID})
    rows = table("search", "--save", "--option", "mask_threshold=0.4")
    assert len(rows) == 2 * 5
    defaults = MaskClsImageProcessor.from_pretrained(model).inference_defaults
    assert (defaults["task"], defaults["tile"], defaults["overlap"]) == ("instance", 32, 0.3)
    for task in ("panoptic", "instance"):
        assert defaults[task] == settings.PAPER[task] | {"threshold": 0.2, "mask_threshold": 0.4}
