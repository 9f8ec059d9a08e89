"""Model cards and `maskcls push`: what they say, what is uploaded, that it loads elsewhere."""

import importlib
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments, pipeline
from typer.testing import CliRunner

import maskcls_hf
from checkpoints import CLASSES, STUFF, image_processor, maskcls_model, picture, save_maskcls, save_perpixel
from maskcls_hf.cli.main import app
from maskcls_hf.data import SegmentationFolder
from maskcls_hf.hub.card_options import CardOptions, Picture, TrainingData
from maskcls_hf.hub.case_pictures import draw_maps, pixels_of
from maskcls_hf.hub.curves import draw_curves
from maskcls_hf.hub.failure_cases import failure_cases
from maskcls_hf.hub.model_card import write_model_card
from maskcls_hf.hub.push import NotLoggedIn, local_pictures, push, stage
from maskcls_hf.hub.scores import Scores
from maskcls_hf.hub.speed import measure_speed
from maskcls_hf.inference import Predictor
from maskcls_hf.metrics import MeanIoU, Segments
from maskcls_hf.training import MaskClsTrainer, load_recipe
from resumable import Squares, make_parts
from samples import sample_of
from without_package import masks_of

PACKAGE = Path(maskcls_hf.__file__).parent
RESULTS = {
    "epoch": 2.0,
    "eval_loss": 1.25,
    "eval_runtime": 3.0,
    "eval_mean_iou": 0.41236,
    "eval_mean_iou_low": 0.4,
    "eval_mean_iou_high": 0.43,
    "eval_pixel_accuracy": 0.875,
    "eval_iou_sky": 0.9,
    "eval_iou_road": 0.8,
    "eval_iou_car": 0.123,
    "eval_iou_person": math.nan,
    "eval_iou_dog": 0.05,
    "eval_pq": 0.3,
    "eval_pq_stuff": 0.5,
    "eval_pq_things": math.nan,
}
LOG = [
    {"step": 1, "loss": 5.0},
    {"step": 2, "loss": 4.0},
    {"step": 2, "eval_loss": 4.5, "eval_mean_iou": 0.2, "eval_pq": 0.1},
    {"step": 2, "train_runtime": 120.0},
]
CARD = CardOptions(
    repo_id="me/streets",
    license="cc-by-4.0",
    data=TrainingData("Two Streets", terms="Ask before you drive.", description="12 images."),
    limitations="Never saw snow.",
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a training leaves behind, with much that nobody should upload."""
    out = save_maskcls(tmp_path / "run")
    load_recipe("camvid", ["evaluation.threshold=0.5", "evaluation.overlap_threshold=0.0"]).save(out / "recipe.yaml")
    (out / "eval_results.json").write_text(json.dumps(RESULTS, sort_keys=True))
    (out / "trainer_state.json").write_text(json.dumps({"global_step": 2, "max_steps": 2, "log_history": LOG}))
    for name in ("training_args.bin", "optimizer.pt", "runs/events.tfevents", "checkpoint-2/optimizer.pt", "notes.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("private")
    save_maskcls(out / "checkpoint-2")
    return out


def snippets(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def run(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


class TestMetadata:
    def test_is_read_by_huggingface_hub(self, folder):
        data = ModelCard.load(write_model_card(folder, CARD)).data
        assert (data.pipeline_tag, data.library_name, data.license) == (
            "image-segmentation",
            "transformers",
            "cc-by-4.0",
        )
        assert data.datasets == ["two-streets"]
        assert data.metrics == ["mean_iou", "accuracy", "pq", "pq_things", "pq_stuff"]
        assert {"mask-classification", "panoptic-segmentation"} <= set(data.tags)
        assert data.base_model is None
        assert data.model_name == "streets"

    def test_results_come_back(self, folder):
        data = ModelCard.load(write_model_card(folder, CARD)).data
        values = {entry.metric_type: entry.metric_value for entry in data.eval_results}
        assert values == {"mean_iou": 0.41236, "accuracy": 0.875, "pq": 0.3, "pq_stuff": 0.5}  # no NaN
        for entry in data.eval_results:
            assert (entry.dataset_name, entry.dataset_type, entry.dataset_split) == (
                "Two Streets",
                "two-streets",
                "val",
            )
        assert model_index_to_eval_results(eval_results_to_model_index("streets", data.eval_results)) == (
            "streets",
            data.eval_results,
        )

    def test_nothing_is_made_up(self, tmp_path):
        """Without recipe, scores, data and license the metadata has none of them."""
        data = ModelCard.load(write_model_card(save_maskcls(tmp_path / "bare"))).data.to_dict()
        assert set(data) == {"library_name", "pipeline_tag", "tags"}

    def test_base_model_is_the_backbone_on_the_hub(self, folder):
        load_recipe("ade20k_r50").save(folder / "recipe.yaml")
        assert ModelCard.load(write_model_card(folder, CARD)).data.base_model == "microsoft/resnet-50"

    def test_names_of_data_become_ids(self):
        names = ["scene_parse_150", "zhoubolei/scene_parse_150", "My data, 2nd edition", "§"]
        expected = ["scene_parse_150", "zhoubolei/scene_parse_150", "my-data-2nd-edition", "unknown"]
        assert [TrainingData(name).hub_id for name in names] == expected


class TestText:
    @pytest.mark.parametrize("save", [save_maskcls, save_perpixel])
    def test_snippets_run(self, save, tmp_path, monkeypatch):
        model = save(tmp_path / "me" / "streets")
        picture().save(tmp_path / "photo.jpg")
        monkeypatch.chdir(tmp_path)
        code = snippets(write_model_card(model, CARD).read_text())
        assert len(code) == 2
        names: dict = {}
        for number, snippet in enumerate(code):
            exec(compile(snippet, f"snippet {number}", "exec"), names)
        found = names["result"]
        found = found if isinstance(found, torch.Tensor) else found["segmentation"]
        assert found.shape == (48, 80)

    def test_command_runs(self, folder, tmp_path, monkeypatch):
        (tmp_path / "photos").mkdir()
        picture().save(tmp_path / "photos" / "a.png")
        folder.rename(tmp_path / "streets")
        monkeypatch.chdir(tmp_path)
        text = write_model_card("streets", CardOptions(repo_id="streets")).read_text()
        command = re.search(r"^    maskcls (segment .*)$", text, flags=re.MULTILINE)
        assert command is not None
        run(*shlex.split(command[1]), "--device", "cpu")
        assert (tmp_path / "found" / "panoptic.json").is_file()

    def test_what_a_card_says(self, folder):
        text = write_model_card(folder, CARD).read_text()
        parameters = sum(parameter.numel() for parameter in maskcls_model().parameters())
        for said in (
            f"{parameters / 1e6:.1f} million parameters: backbone resnet, trained from scratch; 12 queries",
            "Things (with instances): car, person, dog.",
            "Stuff (one segment an image): sky, road.",
            "Two Streets. Trained on its part `train`. 12 images.",
            "Terms of the data: Ask before you drive.",
            "made of the package's recipe `camvid`",
            "    maskcls train --recipe recipe.yaml --data two-streets --out OUT",
            "2 of 2 steps were made, in 2 minutes.",
            "| mean IoU | 41.2 | 40.0 to 43.0 |",
            "| PQ, things | - |  |",
            "Loss: 1.25.",
            "| car | 12.3 |",
            "| person | - |",
            "segments from a class probability of 0.5 that keep 0.0 of their mask",
            "Lowest IoU of a class in per cent: dog (5.0), car (12.3), road (80.0).",
            "- Never saw snow.",
            "Of the weights: cc-by-4.0.",
        ):
            assert said in text
        assert "runtime" not in text

    def test_per_pixel_model_knows_no_instances(self, tmp_path):
        text = write_model_card(save_perpixel(tmp_path / "p"), CARD).read_text()
        assert "AutoModelForSemanticSegmentation" in text and "tells classes apart, not instances" in text
        assert "queries" not in text

    def test_what_is_not_known_is_not_stated(self, tmp_path):
        text = write_model_card(save_maskcls(tmp_path / "bare")).read_text()
        for said in ("Not named here.", "Of the weights: not stated.", "the model was not evaluated"):
            assert said in text
        assert "## Training\n" not in text and "## Speed" not in text

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("training: {seed: 1, seed: 2}", "'seed' stands twice"),
            ("training: {seed: 1}\ntraining: {workers: 0}", "'training' stands twice"),
            ("paper: &p {a: *p}", "stands in what it stands for"),
            ("[" * 100000, "nested deeper"),
            ("training: 3", "must hold sections with keys and values"),
            ("", "must hold sections with keys and values"),
        ],
    )
    def test_a_wrong_recipe_is_named(self, folder, text, message):
        (folder / "recipe.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"recipe.yaml .*{message}"):
            write_model_card(folder, CARD)

    def test_paper_scores_stand_beside(self, folder):
        load_recipe("ade20k_r50").save(folder / "recipe.yaml")
        text = write_model_card(folder, CARD).read_text()
        assert "| score | % | 95 % interval | paper |" in text
        assert "| mean IoU | 41.2 | 40.0 to 43.0 | 44.5 |" in text
        assert "The paper's scores are those of its Table 1." in text

    def test_many_classes_are_folded_away(self, tmp_path):
        out = save_maskcls(tmp_path / "many")
        config = json.loads((out / "config.json").read_text())
        config |= {"id2label": {str(i): f"class {i}" for i in range(40)}}
        (out / "config.json").write_text(json.dumps(config | {"label2id": {f"class {i}": i for i in range(40)}}))
        assert "<details><summary>The 40 classes</summary>" in write_model_card(out).read_text()

    def test_every_picture_is_there(self, folder, tmp_path):
        for name in ("a b", "c"):
            picture().save(tmp_path / f"{name}.png")
        pictures = [Picture(tmp_path / "a b.png", "A street"), Picture(tmp_path / "c.png")]
        out = tmp_path / "elsewhere"
        out.mkdir()
        options = CardOptions(pictures=pictures, failures=pictures[1:])
        shown = local_pictures(write_model_card(folder, options, out).read_text())
        assert list(shown) == ["curves.png", "pictures/a-b.png", "pictures/c.png", "failures/c.png"]
        assert files(out) == {"README.md", *shown}
        Image.open(out / "curves.png").verify()

    def test_without_matplotlib_there_are_no_curves(self, folder, monkeypatch):
        for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
            monkeypatch.setitem(sys.modules, name, None)
        text = write_model_card(folder, CARD).read_text()
        assert not (folder / "curves.png").exists() and "curves" not in text
        assert "2 of 2 steps were made" in text

    def test_no_curves_without_a_log(self, tmp_path):
        assert not draw_curves([], tmp_path / "curves.png")
        assert not draw_curves([{"step": 1, "loss": math.nan}], tmp_path / "curves.png")
        assert not draw_curves([{"step": 1, "eval_mean_iou": 0.5}], tmp_path / "curves.png")
        assert not (tmp_path / "curves.png").exists()

    def test_panels_say_what_they_show(self, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: drawn.append(figure) or path.touch())
        log = [
            {"step": 1, "loss": 3.0},
            {"step": 2, "loss": 2.0, "eval_loss": 2.5, "eval_mean_iou": 0.5, "eval_pq": 0.1},
        ]
        assert draw_curves(log, tmp_path / "curves.png")
        assert draw_curves([*log, {"step": 4, "eval_mean_iou": 0.625}], tmp_path / "curves.png")
        (losses,), both = (figure.axes for figure in drawn)
        assert losses.get_ylabel() == "loss"
        assert [axis.get_title(loc="left") for axis in both] == ["(a) losses", "(b) scores"]
        assert [axis.get_ylabel() for axis in both] == ["loss", "score in evaluation, %"]
        assert all(axis.get_xlabel() == "step" and axis.get_xlim()[0] == 0 < 4 < axis.get_xlim()[1] for axis in both)
        (score,) = both[1].get_lines()  # PQ was measured once
        assert (score.get_label(), score.get_xydata().tolist()) == ("mean IoU", [[2, 50], [4, 62.5]])

    def test_consecutive_trainings_are_one_curve(self):
        joined = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "plot_training.py"))["joined"]
        first, second = [{"step": 1, "loss": 3.0}, {"step": 5, "loss": 2.0}], [{"step": 2, "loss": 1.0}]
        assert joined([first, second]) == [*first, {"step": 7, "loss": 1.0}]


class TestNamesAreText:
    """Names of classes, data and files, and what recipes and scores hold, are text on a card."""

    EVIL = "a\n\n# Heading\n---\n<img src=x onerror=alert(1)> ![x](http://evil/track.png) | `b` [l](http://evil) \x1b"
    MARKS = (
        r"(?<!\\)<img", r"(?<!\\)!\[x\]\(", r"(?m)^# Heading", r"(?<!\\)\]\(http", r"http://evil",
        r"[\x00-\x09\x0b-\x1f]",
    )  # fmt: skip

    def card(self, folder, options: CardOptions) -> str:
        return write_model_card(folder, options).read_text()

    def check(self, text: str) -> None:
        """Nothing but code spans has the marks of the evil name."""
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text.split("\n---\n", 2)[1])
        for mark in self.MARKS:
            assert not re.search(mark, outside), (mark, re.search(mark, outside))

    def test_of_classes(self, folder):
        config = json.loads((folder / "config.json").read_text())
        names = {"0": self.EVIL, "1": "road", "2": "$x$", "3": "person", "4": "dog"}
        (folder / "config.json").write_text(json.dumps(config | {"id2label": names, "label2id": {}}))
        results = {"scores": {"mean_iou": 0.5, self.EVIL: 0.5}, "per_class": {self.EVIL: {"iou": 0.1, self.EVIL: 0.3}}}
        text = self.card(folder, CardOptions(results=[results]))
        self.check(text)
        assert text.count("onerror") == 5 and "\\# Heading" in text

    def test_of_data_recipe_and_settings(self, folder):
        evil = self.EVIL
        (folder / "recipe.yaml").write_text(
            json.dumps(
                {
                    "model": {"backbone_checkpoint": evil},
                    "data": {"train_split": evil},
                    "training": {"seed": evil},
                    "evaluation": {"threshold": f"0.5); import os #{evil}", "overlap_threshold": evil},
                    "paper": {"mean_iou": 1.0, "source": evil},
                }
            )
        )
        settings = dict.fromkeys(("images", "data", "split", "crop", "tile", "step", "threshold"), evil)
        results = [{"scores": {"mean_iou": 0.5}, "settings": settings | {"scales": [evil]}}]
        options = CardOptions(
            repo_id=evil,
            license=evil,
            data=TrainingData(evil, "<b>", "See https://a.org."),
            results=results,
            tags=[evil],
        )
        text = self.card(folder, options)
        code = [line for line in text.splitlines() if "import os" in line]
        for line in code:
            text = text.replace(line, "")
        text = re.sub(r"(?m)^ +maskcls .*$|^.*(from_pretrained|pipeline)\(.*$", "", text)
        self.check(text)
        assert "https://a.org" in text and "\\<b\\>" in text
        assert len(code) == 3 and all('"0.5); import os #' in line or "'0.5); import" in line for line in code)

    def test_of_metadata(self, folder):
        data = TrainingData('x: "y"\n---\n# z')
        card = ModelCard.load(write_model_card(folder, CardOptions(license="mit\n---\ntags: [a]", data=data)))
        assert card.data.license == "mit\\n---\\ntags: [a]" and "a" not in card.data.tags
        assert card.data.eval_results[0].dataset_name == 'x: "y"\\n---\\n# z'

    def test_of_pictures(self, folder, tmp_path):
        picture().save(tmp_path / "# <b> [x](y).png")
        text = self.card(folder, CardOptions(pictures=[Picture(tmp_path / "# <b> [x](y).png")]))
        assert "![\\# \\<b\\> \\[x\\](y)](pictures/-b-x-y-.png)" in text


class TestScores:
    def test_json_of_evaluate(self, folder, tmp_path):
        """What `maskcls evaluate` writes is on the card: the same numbers, data and intervals."""
        for name in "ab":
            for part in ("images", "labels"):
                (tmp_path / "data" / "test" / part).mkdir(parents=True, exist_ok=True)
            picture(64, 64).save(tmp_path / "data" / "test" / "images" / f"{name}.png")
            labels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 5
            Image.fromarray(labels).save(tmp_path / "data" / "test" / "labels" / f"{name}.png")
        (tmp_path / "data" / "labels.json").write_text(json.dumps(CLASSES))
        options = ("--split", "test", "--bootstrap", 20, "--json", tmp_path / "scores.json", "--device", "cpu")
        run("evaluate", "--model", folder, "--data", tmp_path / "data", *options)
        scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
        text = write_model_card(folder, CardOptions(results=[tmp_path / "scores.json"])).read_text()
        assert "On 2 images of data, part `test`" in text
        mean, low, high = (f"{100 * scores[f'mean_iou{end}']:.1f}" for end in ("", "_low", "_high"))
        assert f"| mean IoU | {mean} | {low} to {high} |" in text
        assert f"| sky | {100 * scores['iou_sky']:.1f} |" in text
        assert str(tmp_path) not in text
        assert ModelCard(text).data.eval_results[0].metric_value == round(scores["mean_iou"], 5)

    def test_last_evaluation_of_the_log(self, folder):
        (folder / "eval_results.json").unlink()
        text = write_model_card(folder, CARD).read_text()
        assert "| mean IoU | 20.0 |" in text and "after step 2" in text

    def test_several_evaluations(self, folder):
        splits = [{"scores": {"mean_iou": value}, "settings": {"split": str(value)}} for value in (0.25, 0.75)]
        card = write_model_card(folder, CardOptions(results=splits))
        results = ModelCard.load(card).data.eval_results
        assert [(entry.dataset_split, entry.metric_value) for entry in results] == [("0.25", 0.25), ("0.75", 0.75)]

    @pytest.mark.parametrize("name", ["eval_mean_iou", "eval_loss", "eval_pq"])
    def test_nan_is_refused(self, name, folder):
        (folder / "eval_results.json").write_text(json.dumps(RESULTS | {name: math.nan}))
        with pytest.raises(ValueError, match=rf"eval_results.json: {name[5:]} is nan"):
            write_model_card(folder, CARD)
        assert not (folder / "README.md").exists()

    def test_infinity_is_refused_everywhere(self):
        with pytest.raises(ValueError, match="ap_small is inf"):
            Scores.of({"ap": 0.5, "ap_small": math.inf})

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not valid JSON"),
            ("[1]", "names and scores"),
            ('{"ap": 0.5, "per_class": [1]}', "does not hold scores"),
            (f'{{"ap": 1{"0" * 400}}}', "does not hold scores"),
            ('{"epoch": 1}', "there are no scores"),
        ],
    )
    def test_files_without_scores(self, content, message, tmp_path):
        (tmp_path / "scores.json").write_text(content)
        with pytest.raises(ValueError, match=rf"scores.json.*{message}"):
            Scores.read(tmp_path / "scores.json")

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="scores.json"):
            Scores.read(tmp_path / "scores.json")

    def test_names_of_classes_that_look_like_other_scores(self):
        scores = Scores.of(
            {"pq": 0.5, "pq_things": 0.6, "mean_iou": 0.2, "iou_low": 0.1, "iou_things": 0.3}, ["low", "things"]
        )
        assert scores.overall == {"pq": 0.5, "pq_things": 0.6, "mean_iou": 0.2}
        assert scores.per_class == {"low": {"iou": 0.1}, "things": {"iou": 0.3}}


class TestSpeed:
    def test_names_the_machine(self):
        speed = measure_speed(maskcls_model(), image_processor(), size=(48, 80), repeats=2)
        assert speed.milliseconds > 0 and speed.size == (64, 128) and "1 thread, torch" in speed.machine

    def test_is_on_the_card(self, folder):
        speed = measure_speed(maskcls_model(), image_processor(), size=(48, 80), repeats=1)
        text = write_model_card(folder, CardOptions(speed=speed)).read_text()
        assert f"of one image of 128 x 64 pixels, on {speed.machine}." in text


class TestFailureCases:
    @pytest.fixture
    def data(self, tmp_path) -> SegmentationFolder:
        """Images that the model is right on ("good"), half right ("middling"), wrong ("bad"); one is void."""
        predict = Predictor(maskcls_model(), image_processor())
        root = tmp_path / "data"
        for part in ("images", "labels"):
            (root / "val" / part).mkdir(parents=True)
        found = predict(picture(64, 64), "semantic")["segmentation"].numpy().astype(np.uint8)
        half = found.copy()
        half[:32] = (half[:32] + 1) % 5
        truths = {"good": found, "middling": half, "bad": (found + 1) % 5, "void": np.full_like(found, 255)}
        for name, labels in truths.items():
            picture(64, 64).save(root / "val" / "images" / f"{name}.png")
            Image.fromarray(labels).save(root / "val" / "labels" / f"{name}.png")
        (root / "labels.json").write_text(json.dumps(CLASSES))
        return SegmentationFolder(root, "val")

    def test_worst_first_with_their_own_scores(self, data):
        predict = Predictor(maskcls_model(), image_processor())
        cases = failure_cases(predict, data, number=2)
        assert [case.name for case in cases] == ["bad", "middling"]
        assert cases[0].score == 0.0
        metric, sample = MeanIoU(CLASSES), data[data.names.index("middling")]
        metric.update(predict(sample["image"], "semantic")["segmentation"], sample["segments"])
        assert cases[1].score == metric.compute()["mean_iou"]
        assert failure_cases(predict, data, number=9)[-1].score == 1.0  # "void" has no score

    def test_picture_shows_annotation_and_prediction(self, data):
        predict = Predictor(maskcls_model(), image_processor())
        bad, _, good = failure_cases(predict, data, number=3)
        for case, equal in ((good, True), (bad, False)):
            pixels = np.asarray(case.picture)
            _, annotated, found = (pixels[:, start : start + 420].astype(int) for start in (0, 428, 856))
            assert bool(np.abs(annotated - found).mean() < 1) is equal

    def test_maps_alone_show_errors_and_no_photograph(self, data):
        predict = Predictor(maskcls_model(), image_processor())
        cases = failure_cases(predict, data, number=3, maps_only=True)
        for case, wrong in zip(cases, (1.0, 0.5, 0.0), strict=True):
            errors = np.asarray(case.picture)[:, 428:848]
            assert (errors == (214, 39, 40)).all(2).mean() == pytest.approx(wrong, abs=0.05)  # the border is blurred
            assert "in red where its class is wrong" in case.caption
        sample = data[data.names.index("bad")]
        repainted = {**sample, "image": 255 - sample["image"]}
        true, found = (Segments([0], np.zeros((64, 64), int)) for _ in range(2))
        drawn = [draw_maps(pixels_of(s["image"]), true, found, CLASSES, [0]) for s in (sample, repainted)]
        assert np.array_equal(*map(np.asarray, drawn))

    def test_instances(self):
        """F1 of things in the panoptic map; the annotation has the model's own segments."""
        predict = Predictor(maskcls_model(), image_processor())
        found = predict(picture(64, 64), "panoptic", threshold=0.5, overlap_mask_area_threshold=0.0)
        things = [info for info in found["segments_info"] if info["label_id"] not in STUFF]
        assert things
        data = OwnResult(found, things)
        (case,) = failure_cases(predict, data, 1, "instance", threshold=0.5, overlap_mask_area_threshold=0.0)
        assert (case.metric, case.score) == ("f1", 1.0)
        (case,) = failure_cases(predict, data, 1, "panoptic", threshold=0.5, overlap_mask_area_threshold=0.0)
        assert (case.metric, case.score) == ("pq", 1.0)

    def test_other_classes_are_refused(self, data):
        data.id2label = {0: "cat"}
        with pytest.raises(ValueError, match="classes of the model and of the data differ"):
            failure_cases(Predictor(maskcls_model(), image_processor()), data)


class OwnResult:
    """One image whose annotation is a panoptic result."""

    def __init__(self, found: dict, things: list):
        self.id2label, self.stuff_ids, self.void_id, self.found = CLASSES, STUFF, 255, found

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        segments = {info["id"]: info["label_id"] for info in self.found["segments_info"]}
        ids = self.found["segmentation"]
        classes = {i: segments.get(i) for i in ids.unique().tolist()}
        pixels = torch.from_numpy(np.array(picture(64, 64))).permute(2, 0, 1).contiguous()
        return sample_of(ids, classes, name="one", image=pixels)


class Hub:
    """In place of `HfApi`: repositories are folders."""

    root: Path
    calls: list

    def __init__(self, token=None):
        Hub.calls.append(("login", token))

    def create_repo(self, repo_id, *, private=None, exist_ok=False, token=None):
        Hub.calls.append(("create", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def run_as_future(self, function, *args, **kwargs):
        return ThreadPoolExecutor(1).submit(function, *args, **kwargs)

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None):
        for name in files(Path(folder_path)):
            target = Hub.root / repo_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((Path(folder_path) / name).read_bytes())
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> type[Hub]:
    Hub.root, Hub.calls = tmp_path / "hub", []
    for name in ("maskcls_hf.hub.push.HfApi", "maskcls_hf.training.trainer.HfApi", "transformers.trainer.hf_api"):
        monkeypatch.setattr(name, Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return Hub


class TestPush:
    def test_only_what_belongs_is_uploaded(self, folder, hub):
        before = files(folder)
        push(folder, "me/streets", CARD, private=True)
        code = {path.name for path in folder.glob("*.py")}
        assert len(code) > 10
        assert files(hub.root / "me" / "streets") == code | {
            "README.md",
            "config.json",
            "curves.png",
            "model.safetensors",
            "preprocessor_config.json",
            "recipe.yaml",
        }
        assert files(folder) == before
        assert ("create", "me/streets", True, True) in hub.calls

    def test_the_final_model_is_uploaded_unchanged(self, folder, hub):
        checkpoint = load_file(folder / "checkpoint-2" / "model.safetensors")
        save_file({name: v + 1 for name, v in checkpoint.items()}, folder / "checkpoint-2" / "model.safetensors")
        push(folder, "me/streets", CARD)
        ours, theirs = (load_file(f / "model.safetensors") for f in (folder, hub.root / "me" / "streets"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)

    def test_a_checkpoint_takes_the_recipe_above(self, folder, hub):
        push(folder / "checkpoint-2", "me/streets", CARD)
        uploaded = hub.root / "me" / "streets"
        assert (uploaded / "recipe.yaml").read_bytes() == (folder / "recipe.yaml").read_bytes()
        assert "the model was not evaluated" in (uploaded / "README.md").read_text()

    def test_dry_run_is_what_would_be_uploaded(self, folder, hub, tmp_path):
        options = ("--license", "mit", "--dataset", "Two Streets", "--data-terms", "Ask.")
        run("push", folder, "me/streets", "--dry-run", tmp_path / "look", *options)
        assert hub.calls == []
        result = run("push", folder, "me/streets", *options)
        assert "hub/me/streets/commit/1" in result.stderr
        uploaded = hub.root / "me" / "streets"
        assert files(uploaded) == files(tmp_path / "look")
        for name in files(uploaded):
            assert (uploaded / name).read_bytes() == (tmp_path / "look" / name).read_bytes(), name

    def test_code_comes_where_a_folder_has_none(self, folder, hub):
        for path in folder.glob("*.py"):
            path.unlink()
        push(folder, "me/streets", CARD)
        assert (hub.root / "me" / "streets" / "modeling_maskcls.py").is_file()
        assert "auto_map" in json.loads((hub.root / "me" / "streets" / "config.json").read_text())

    def test_loads_without_the_package(self, folder, hub, tmp_path):
        """`pipeline(..., trust_remote_code=True)` of what was pushed, where maskcls_hf cannot be imported."""
        push(folder, "me/streets", CARD)
        picture().save(tmp_path / "picture.png")
        script = (
            "import sys; from pathlib import Path; from without_package import Hidden, masks_of\n"
            "sys.meta_path.insert(0, Hidden())\n"
            "import numpy as np; from PIL import Image; from transformers import pipeline\n"
            "pipe = pipeline('image-segmentation', model=sys.argv[1], device='cpu', trust_remote_code=True)\n"
            "assert type(pipe.model).__module__.startswith('transformers_modules.')\n"
            "np.save(sys.argv[3], masks_of(pipe, Image.open(sys.argv[2]), 'panoptic'))\n"
        )
        arguments = [hub.root / "me" / "streets", tmp_path / "picture.png", tmp_path / "masks.npy"]
        env = os.environ | {
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parent),
        }
        done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        here = masks_of(pipeline("image-segmentation", model=str(folder), device="cpu"), picture(), "panoptic")
        assert len(here) > 1
        np.testing.assert_array_equal(np.load(tmp_path / "masks.npy"), here)

    @pytest.fixture
    def streets(self, tmp_path) -> Path:
        """A data set of one image."""
        for part in ("images", "labels"):
            (tmp_path / "data" / "val" / part).mkdir(parents=True)
        picture(64, 64).save(tmp_path / "data" / "val" / "images" / "corner.png")
        Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(tmp_path / "data" / "val" / "labels" / "corner.png")
        (tmp_path / "data" / "labels.json").write_text(json.dumps(CLASSES))
        return tmp_path / "data"

    def test_failures_and_speed_come_onto_the_card(self, folder, hub, streets, tmp_path):
        options = ("--failures", streets, "--speed", "--device", "cpu")
        run("push", folder, "me/streets", *options, "--dry-run", tmp_path / "look")
        text = (tmp_path / "look" / "README.md").read_text()
        assert "![corner, " in text and "failures/failure-1.jpg" in text and "ms a forward pass" in text
        Image.open(tmp_path / "look" / "failures" / "failure-1.jpg").verify()

    def test_cards_of_the_trainings_in_the_repository(self, folder, streets, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(str(PACKAGE.parents[1] / "model_cards"))
        make_cards = importlib.import_module("make_cards")
        results = {"runs": {"run": "streets/fixed", "absent": "streets/absent"}, "results": "eval_results.json"}
        training = replace(make_cards.TRAININGS[0], data=streets.name, split="val", **results)
        monkeypatch.setattr(make_cards, "HERE", tmp_path / "cards")
        monkeypatch.setattr(make_cards, "TRAININGS", [training])
        monkeypatch.setattr(make_cards.subprocess, "run", lambda command, check: run(*command[3:]))
        (tmp_path / "cards").mkdir()
        monkeypatch.setattr(sys, "argv", ["make_cards.py", f"--runs={folder.parent}", f"--data={streets.parent}"])
        with pytest.raises(SystemExit, match="absent has no eval_results.json"):
            make_cards.main()
        card = tmp_path / "cards" / "streets" / "fixed"
        text = (card / "README.md").read_text()
        assert training.terms in text and "41.2" in text and "failures/failure-1.jpg" in text
        assert not list(card.glob("*.safetensors")) and (card / "recipe.yaml").is_file()

    def test_a_card_without_weights(self, folder, hub, tmp_path):
        run("push", folder, "me/streets", "--without-weights", "--dry-run", tmp_path / "look")
        files = {path.name for path in (tmp_path / "look").iterdir()}
        assert "README.md" in files and not files & {"model.safetensors", "config.json", "modeling_maskcls.py"}
        text = (tmp_path / "look" / "README.md").read_text()
        assert "The weights are not published" in text and "from_pretrained" not in text and "## License" not in text
        result = run("push", folder, "me/streets", "--without-weights", code=1)
        assert "add --dry-run" in " ".join(result.output.split())


class TestTrainer:
    def trainer(self, out: Path, **arguments) -> MaskClsTrainer:
        """Two steps, with averaged weights."""
        model, optimizer, scheduler, collator, average = make_parts()
        trainer = MaskClsTrainer(
            model=model,
            args=TrainingArguments(
                str(out),
                hub_model_id="me/squares",
                max_steps=2,
                per_device_train_batch_size=2,
                learning_rate=0.1,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **arguments,
            ),
            ema=average,
            train_dataset=Squares(4),
            data_collator=collator,
            processing_class=image_processor(),
            optimizers=(optimizer, scheduler),
        )
        trainer.train()
        return trainer

    def averaged(self, trainer: MaskClsTrainer) -> dict[str, torch.Tensor]:
        with trainer.ema.swapped(trainer.model):
            return {name: value.clone() for name, value in trainer.model.state_dict().items()}

    def test_push_to_hub(self, hub, tmp_path):
        trainer = self.trainer(tmp_path / "out")
        commit = trainer.push_to_hub(license="mit", dataset="Squares", tags="geometry", private=True)
        assert commit.commit_url == "hub/me/squares/commit/1"
        uploaded = hub.root / "me" / "squares"
        assert files(uploaded) - {path.name for path in uploaded.glob("*.py")} == {
            "README.md",
            "config.json",
            "curves.png",
            "model.safetensors",
            "preprocessor_config.json",
        }
        data = ModelCard.load(uploaded / "README.md").data
        assert (data.license, data.datasets) == ("mit", ["Squares"]) and "geometry" in data.tags
        weights, expected = load_file(uploaded / "model.safetensors"), self.averaged(trainer)
        assert weights.keys() <= expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        assert not all(torch.equal(weights[name], trainer.model.state_dict()[name]) for name in weights)

    def test_save_model_pushes_averaged_weights_once(self, hub, tmp_path):
        """With `push_to_hub=True`."""
        trainer = self.trainer(tmp_path / "out", push_to_hub=True)
        hub.calls.clear()
        trainer.save_model()
        assert [call[0] for call in hub.calls].count("create") == 1
        weights = load_file(hub.root / "me" / "squares" / "model.safetensors")
        expected = self.averaged(trainer)
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
        assert trainer.push_to_hub(blocking=False).result().commit_url == "hub/me/squares/commit/1"

    def test_create_model_card(self, tmp_path):
        trainer = self.trainer(tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="no model"):
            trainer.create_model_card()
        trainer.save_model()
        trainer.create_model_card(model_name="Squares", dataset="Squares")
        text = (tmp_path / "out" / "README.md").read_text()
        assert "# Squares" in text and "2 of 2 steps were made" in text
        with pytest.raises(TypeError, match="language"):
            trainer.create_model_card(language="en")


class TestHandwrittenCard:
    @pytest.fixture
    def handwritten(self, folder) -> Path:
        picture().save(folder / "val.png")
        text = "# Mine\n\n![a](val.png) ![b](https://example.org/b.png)\n"
        (folder / "README.md").write_text(text)
        return folder

    def test_is_kept_with_its_pictures(self, handwritten, tmp_path):
        result = run("push", handwritten, "me/streets", "--dry-run", tmp_path / "look")
        assert "written by hand" in result.stderr
        assert (tmp_path / "look" / "README.md").read_text() == (handwritten / "README.md").read_text()
        assert {"val.png"} == {name for name in files(tmp_path / "look") if name.endswith(".png")}

    def test_is_replaced_on_request(self, handwritten, tmp_path):
        stage(handwritten, tmp_path / "look", "me/streets", new_card=True)
        assert "# streets" in (tmp_path / "look" / "README.md").read_text()

    def test_a_picture_is_missing(self, handwritten, tmp_path):
        (handwritten / "val.png").unlink()
        with pytest.raises(FileNotFoundError, match="shows val.png"):
            stage(handwritten, tmp_path / "look", "me/streets")
        assert not (tmp_path / "look").exists()

    @pytest.mark.parametrize("name", ["optimizer.pt", "link.png"])
    def test_nothing_but_pictures_of_the_folder_is_published(self, name, handwritten, tmp_path):
        (tmp_path / "secret").write_text("secret")
        (handwritten / "link.png").symlink_to(tmp_path / "secret")
        (handwritten / "README.md").write_text(f"![a]({name})")
        with pytest.raises(ValueError, match=f"{name}, which is no picture inside"):
            stage(handwritten, tmp_path / "look", "me/streets")
        assert not (tmp_path / "look").exists()

    def test_a_generated_one_is_renewed(self, folder, tmp_path):
        write_model_card(folder, CARD)
        stage(folder, tmp_path / "look", "me/avenues", CARD)
        assert "# avenues" in (tmp_path / "look" / "README.md").read_text()


class TestErrors:
    def test_no_folder(self, tmp_path):
        assert "There is no folder" in run("push", tmp_path / "x", "me/x", "--dry-run", tmp_path / "y", code=1).stderr

    def test_checkpoints_without_a_final_model(self, folder, tmp_path):
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match="config.json is missing.*checkpoint-2"):
            stage(folder, tmp_path / "look", "me/x")

    @pytest.mark.parametrize(
        ("name", "message"),
        [("model.safetensors", "no weights"), ("preprocessor_config.json", "save the image processor")],
    )
    def test_files_are_missing(self, name, message, folder, tmp_path):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=message):
            stage(folder, tmp_path / "look", "me/x")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights, name: weights.pop(name), "lack 1 entries, such as"),
            (lambda weights, name: weights[name].view(-1)[:1].fill_(math.nan), "holds NaN or infinite"),
            (lambda weights, name: weights.update({name: weights[name][:1]}), "do not fit its config.json"),
        ],
        ids=["absent", "nan", "size"],
    )
    def test_broken_weights(self, change, message, folder, hub):
        weights = load_file(folder / "model.safetensors")
        change(weights, "segmentation_module.class_predictor.weight")
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            push(folder, "me/x")
        assert not hub.root.exists() and not any(call[0] == "create" for call in hub.calls)

    def test_another_model(self, folder, tmp_path):
        (folder / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="holds a bert"):
            stage(folder, tmp_path / "look", "me/x")

    @pytest.mark.parametrize("repo_id", ["streets", "me/a/b", "me/ö", ""])
    def test_names_that_the_hub_refuses(self, repo_id, folder, tmp_path):
        with pytest.raises(ValueError, match="cannot be the name|lacks the owner"):
            stage(folder, tmp_path / "look", repo_id)

    def test_not_logged_in(self, folder, monkeypatch):
        monkeypatch.setattr("maskcls_hf.hub.push.get_token", lambda: None)
        with pytest.raises(NotLoggedIn, match="hf auth login"):
            push(folder, "me/x")
        assert "hf auth login" in run("push", folder, "me/x", code=1).stderr

    def test_the_folder_of_a_dry_run_has_files(self, folder):
        assert "not an empty folder" in run("push", folder, "me/x", "--dry-run", folder, code=1).stderr

    def test_nan_scores_upload_nothing(self, folder, hub):
        (folder / "eval_results.json").write_text(json.dumps({"eval_mean_iou": math.nan}))
        assert "mean_iou is nan" in run("push", folder, "me/x", code=1).stderr
        assert not hub.root.exists()

    def test_a_missing_license_is_said(self, folder, tmp_path):
        result = run("push", folder, "me/x", "--dry-run", tmp_path / "look")
        assert "No license" in result.stderr and "--dataset" in result.stderr
        assert "license" not in ModelCard.load(tmp_path / "look" / "README.md").data.to_dict()

    def test_terms_of_no_data(self, folder, tmp_path):
        result = run("push", folder, "me/x", "--dry-run", tmp_path / "look", "--data-terms", "Ask.", code=1)
        assert "--dataset" in result.stderr
