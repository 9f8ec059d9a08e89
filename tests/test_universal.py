"""Universal models of transformers as they are: `Predictor`, `maskcls segment`, `evaluate` and `tune`; and what of
theirs is refused, by name."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, DetrConfig, DetrForSegmentation, DetrImageProcessor
from typer.testing import CliRunner

from checkpoints import CLASSES, STUFF, image_processor, picture, save_maskcls, save_perpixel
from maskcls_hf import (
    MaskClsConfig,
    MaskClsForUniversalSegmentation,
    MaskClsImageProcessor,
    MaskClsModel,
    PerPixelConfig,
    PerPixelForSemanticSegmentation,
    load_recipe,
    open_dataset,
)
from maskcls_hf.cli.main import app
from maskcls_hf.inference import Predictor, evaluate
from maskcls_hf.inference.loading import class_of_saved
from maskcls_hf.metrics import Evaluator
from maskcls_hf.training import train
from tiny import resnet
from universal_models import BUILDERS, SIZE, oneformer, random_and_sure, write_coco

TASKS = {
    "semantic": {},
    "panoptic": dict(threshold=0.3, overlap_mask_area_threshold=0.2),
    "instance": dict(threshold=0.2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("universal")
    found = {name: random_and_sure(build) for name, build in BUILDERS.items()}
    return found | {"oneformer": random_and_sure(oneformer, root / "metadata")}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """Of OneFormer, which somebody has copied with its class metadata beside it."""
    root = tmp_path_factory.mktemp("oneformer")
    model, processor = models["oneformer"]
    model.save_pretrained(root)
    processor.save_pretrained(root)
    fields = json.loads((root / "processor_config.json").read_text())
    shutil.copy(f"{fields['image_processor'].pop('repo_path')}/classes.json", root)
    fields["image_processor"].pop("metadata")
    (root / "processor_config.json").write_text(json.dumps(fields))
    return root


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


def maps_by_hand(model, processor, image, task: str, valid: tuple[int, int], options: dict):
    """Of our post-processing, from the outputs of their model on what their processor gives."""
    given = {"task_inputs": [task]} if hasattr(processor, "tokenizer") else {}
    inputs = processor(images=[image], return_tensors="pt", **given)
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = dict(valid_sizes=[valid], padded_sizes=[inputs["pixel_values"].shape[-2:]], original_sizes=[(48, 80)])
    ours = MaskClsImageProcessor(label_ids_to_fuse=STUFF if given else None)
    logits = {name: outputs[name] for name in ("class_queries_logits", "masks_queries_logits")}
    outputs = SimpleNamespace(**logits, **sizes)
    return getattr(ours, f"post_process_{task}_segmentation")(outputs, **options)[0]


class TestPredictor:
    @pytest.mark.parametrize("name", [*BUILDERS, "oneformer"])
    def test_maps_are_ours_of_their_outputs(self, models, name):
        model, processor = models[name]
        # Images of 48 x 80: their sizes, the multiple of 32 that the image is stretched to, or 64 x 64 with padding.
        valid = {"eomt": (38, 64), "oneformer": (64, 106)}.get(name, (64, 128))
        predict = Predictor(model, processor)
        for task, options in TASKS.items():
            found = predict(picture(), task, **options)
            expected = maps_by_hand(model, processor, picture(), task, valid, options)
            expected = expected if task == "semantic" else expected["segmentation"]
            assert torch.equal(found["segmentation"], expected.to(found["segmentation"].dtype))
            assert found["segments_info"] and found["segmentation"].shape == (48, 80)

    @pytest.mark.parametrize("name", ["maskformer", "mask2former"])
    def test_a_model_as_it_is_and_its_folder_make_the_same_maps(self, models, name, tmp_path):
        model, processor = models[name]
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        ours = Predictor.from_pretrained(tmp_path)
        assert isinstance(ours.model, MaskClsForUniversalSegmentation)
        ours.image_processor.compatibility = "exact"  # as maps of models as they are
        image = picture(64, 96)  # that neither resizes otherwise
        for task, options in TASKS.items():
            found, expected = (predict(image, task, **options) for predict in (Predictor(model, processor), ours))
            assert (found["segmentation"] != expected["segmentation"]).float().mean() < 1e-3  # ties

    @pytest.mark.parametrize("name", BUILDERS)
    def test_their_models_take_our_image_processor(self, models, name):
        model, _ = models[name]
        ours = MaskClsImageProcessor(size=dict(height=64, width=64), size_divisor=None)
        found = Predictor(model, ours)(picture(), "panoptic", threshold=0.1)
        assert found["segmentation"].shape == (48, 80)

    @pytest.mark.parametrize("name", [*BUILDERS, "oneformer"])
    def test_a_batch_and_tiles(self, models, name):
        """Images of several sizes, padded together, have maps of their sizes; larger ones are cut into tiles."""
        predict = Predictor(*models[name], batch_size=3, tile=96)
        images = [picture(48, 80), picture(64, 64), picture(80, 150)]
        for task, options in TASKS.items():
            results = predict(images, task, **options)
            assert [tuple(found["segmentation"].shape) for found in results] == [(48, 80), (64, 64), (80, 150)]

    def test_scales(self, models):
        predict = Predictor(*models["mask2former"], scales=[0.5, 1.0], flip=True)
        assert predict(picture())["segmentation"].shape == (48, 80)

    def test_each_task_is_told_to_the_model(self, models, monkeypatch):
        model, processor = models["oneformer"]
        forward, seen = model.forward, []

        def recorded(pixel_values, task_inputs, pixel_mask=None):
            seen.append(task_inputs)
            return forward(pixel_values, task_inputs=task_inputs, pixel_mask=pixel_mask)

        monkeypatch.setattr(model, "forward", recorded)
        Predictor(model, processor, batch_size=2).predict([picture(), picture()], dict.fromkeys(TASKS, {}))
        expected = [processor([picture()] * 2, [task] * 2, return_tensors="pt")["task_inputs"] for task in TASKS]
        assert len(seen) == 3 and all(map(torch.equal, seen, expected)) and not torch.equal(seen[0], seen[1])

    def test_other_models_see_an_image_once_for_all_tasks(self, models, monkeypatch):
        model, processor = models["mask2former"]
        calls = []
        model_hook = model.register_forward_hook(lambda *_: calls.append(1))
        Predictor(model, processor).predict([picture()], dict.fromkeys(TASKS, {}))
        model_hook.remove()
        assert calls == [1]

    def test_stuff_is_what_the_class_metadata_does_not_call_things(self, models):
        predict = Predictor(*models["oneformer"])
        assert predict.image_processor.label_ids_to_fuse == STUFF
        found = predict(picture(), "panoptic", threshold=0.0, overlap_mask_area_threshold=0.0)["segments_info"]
        assert {info["was_fused"] for info in found if info["label_id"] in STUFF} <= {True}

    def test_padding_of_an_image_processor_that_tells_of_none_is_cropped(self, models):
        """EoMT's maps of padded images are not stretched."""
        predict = Predictor(*models["eomt"])
        inputs = predict.image_processor([torch.zeros(3, 48, 80, dtype=torch.uint8)])
        mask = inputs["pixel_mask"][0]
        assert mask.sum() == 38 * 64 and mask[:38].all() and inputs["original_sizes"].tolist() == [[48, 80]]

    def test_a_saved_oneformer(self, models, folder):
        predict, expected = Predictor.from_pretrained(folder), Predictor(*models["oneformer"])
        for task, options in TASKS.items():
            found = predict(picture(), task, **options)
            assert torch.equal(found["segmentation"], expected(picture(), task, **options)["segmentation"])


class TestRefusals:
    def test_oneformer_without_class_metadata(self, models, folder, tmp_path):
        model, processor = models["oneformer"]
        bare = oneformer(tmp_path, class_info_file=None)[1]
        with pytest.raises(ValueError, match="no class metadata.*class_info_file.*repo_path"):
            Predictor(model, bare)
        with pytest.raises(ValueError, match="its own processor"):
            Predictor(model, image_processor())
        with pytest.raises(ValueError, match="give the processor with its tokenizer"):
            Predictor(model, processor.image_processor)
        copied = shutil.copytree(folder, tmp_path / "copied")
        (copied / "classes.json").unlink()
        with pytest.raises(ValueError, match=r"cannot be loaded.*class metadata, classes\.json, was looked for beside"):
            Predictor.from_pretrained(copied)

    def test_a_oneformer_in_training(self, models, monkeypatch):
        model, processor = models["oneformer"]
        monkeypatch.setattr(model.config, "is_training", True)
        with pytest.raises(ValueError, match="is_training=False"):
            Predictor(model, processor)

    def test_eomt_of_another_size(self, models):
        """320 x 1280 has as many patches as 640 x 640: transformers takes the one for the other in silence."""
        model, processor = models["eomt"]
        wide = MaskClsImageProcessor(size=dict(height=32, width=128))
        with pytest.raises(ValueError, match="takes images of 64 x 64, its image processor gives 32 x 128"):
            Predictor(model, wide)(picture())
        with pytest.raises(ValueError, match="does not resize to"):
            Predictor(model, processor, enlarge=2.0)(picture())
        windows = type(processor)(size=processor.size, do_split_image=True)
        with pytest.raises(ValueError, match=r"windows.*do_split_image=False.*tile="):
            Predictor(model, windows)

    def test_outputs_without_pairs(self, tmp_path):
        detr = DetrForSegmentation(
            DetrConfig(backbone_config=resnet(), d_model=64, encoder_layers=1, decoder_layers=1, num_queries=3)
        )
        with pytest.raises(ValueError, match="DetrForSegmentation predicts no probability-mask pairs"):
            Predictor(detr, DetrImageProcessor(size=SIZE))(picture())
        detr.config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="pairs_from_detr"):
            class_of_saved(tmp_path)

    @pytest.mark.parametrize(
        ("model_type", "classes", "message"),
        [
            ("oneformer", ("mask", "model", "pixel"), "maskcls_hf.Predictor runs it"),
            ("segformer", ("mask", "model", "pixel"), "maskcls convert"),
            ("resnet", ("mask", "model", "pixel"), "from_backbone"),
            ("bert", ("mask", "model", "pixel"), "AutoModel"),
            ("nothing-known", ("mask", "model", "pixel"), "AutoModel"),
            ("maskcls_perpixel", ("mask", "model"), "PerPixelForSemanticSegmentation reads it"),
            ("maskcls", ("pixel",), "MaskClsForUniversalSegmentation reads it"),
            ("maskformer", ("pixel",), "MaskClsForUniversalSegmentation reads it"),
            ("eomt_dinov3", ("pixel",), "MaskClsForUniversalSegmentation reads it"),
        ],
    )
    def test_configurations_and_models_of_other_types(self, tmp_path, model_type, classes, message):
        """They loaded as MaskFormers with random weights."""
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        readers = {
            "mask": (MaskClsConfig, MaskClsForUniversalSegmentation),
            "model": (MaskClsModel,),
            "pixel": (PerPixelConfig, PerPixelForSemanticSegmentation),
        }
        for reader in (reader for name in classes for reader in readers[name]):
            read = "maskcls_perpixel" if reader in readers["pixel"] else "maskcls, maskformer, mask2former, eomt"
            with pytest.raises(ValueError, match=f"model_type '{model_type}'.* read {read}.*{message}"):
                reader.from_pretrained(tmp_path)
        config = MaskClsConfig(backbone_config=resnet())
        if "mask" in classes:
            with pytest.raises(ValueError, match=message):
                MaskClsForUniversalSegmentation.from_pretrained(tmp_path, config=config)

    def test_own_types_are_read(self, tmp_path):
        save_maskcls(tmp_path / "maskcls")
        save_perpixel(tmp_path / "perpixel")
        assert MaskClsModel.from_pretrained(tmp_path / "maskcls").config.model_type == "maskcls"
        assert PerPixelConfig.from_pretrained(tmp_path / "perpixel").id2label == CLASSES

    @pytest.mark.parametrize(
        "kind",
        [
            "OneFormerImageProcessor", "DetrImageProcessor", "SamImageProcessor", "VideoMAEImageProcessorPil",
            "SomebodysImageProcessor",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
    def test_image_processors_of_other_types(self, tmp_path, kind, key):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: kind}))
        with pytest.raises(ValueError, match=f"{kind} is no image processor that MaskClsImageProcessor reads"):
            MaskClsImageProcessor.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "kind",
        [
            "MaskClsImageProcessor", "MaskFormerImageProcessor", "MaskFormerImageProcessorFast",
            "MaskFormerFeatureExtractor", "Mask2FormerImageProcessorPil", "EomtImageProcessor", "ViTImageProcessor",
            "ViTFeatureExtractor", "BitImageProcessor", "ConvNextImageProcessor", "DINOv3ViTImageProcessor",
            "SegformerImageProcessor", "BeitFeatureExtractor", "DPTImageProcessor", "TimmWrapperImageProcessor",
        ],
    )  # fmt: skip
    def test_image_processors_of_segmentation_models_and_backbones_are_read(self, tmp_path, kind):
        fields = {"image_processor_type": kind, "image_mean": [0.25, 0.25, 0.25]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
        assert MaskClsImageProcessor.from_pretrained(tmp_path).image_mean == (0.25, 0.25, 0.25)


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


class TestCommands:
    """Of a OneFormer."""

    def test_segment(self, folder, coco, tmp_path):
        for task in TASKS:
            run("segment", coco / "val2017", "-m", folder, "-o", tmp_path / task, "-t", task, "--device", "cpu")
            assert (tmp_path / task / f"{task}.json").is_file()
        run("segment", coco / "val2017", "-m", folder, "-o", tmp_path / "own", "--device", "cpu")
        assert (tmp_path / "own" / "panoptic.json").is_file()

    def test_evaluate(self, folder, coco, tmp_path):
        path = tmp_path / "scores.json"
        run("evaluate", "-m", folder, "-d", coco, "--json", path, "--device", "cpu")
        assert {"pq", "mean_iou"} <= json.loads(path.read_text())["scores"].keys()

    def test_tune(self, folder, coco, tmp_path):
        """Thresholds are kept among the options of its image processor, which transformers hands on."""
        out = tmp_path / "tuned"
        run("tune", "-m", folder, "-d", coco, "-o", out, "--device", "cpu")
        best = json.loads((out / "tuning_panoptic.json").read_text())["options"]
        assert Predictor.from_pretrained(out).image_processor.inference_defaults["panoptic"] == best
        assert Predictor.from_pretrained(folder).image_processor.inference_defaults != best
        again = AutoProcessor.from_pretrained(out, repo_path=str(out))
        assert again.image_processor.inference_defaults["panoptic"] == best
        assert torch.equal(
            Predictor.from_pretrained(out)(picture(), "semantic")["segmentation"],
            Predictor.from_pretrained(folder)(picture(), "semantic")["segmentation"],
        )

    def test_fine_tuning_is_refused(self, folder, coco, tmp_path):
        result = run("train", "-r", "finetune", "--model", folder, "-d", coco, "-o", tmp_path / "out", code=1)
        message = " ".join(result.output.split())
        assert "'oneformer'" in message and "does not train" in message and "mask2former" in message
        assert not (tmp_path / "out" / "model.safetensors").exists()


FEW = [
    "schedule.max_steps=2", "schedule.warmup_steps=1", "training.workers=0", "training.batch_size=2",
    "training.save_steps=2", "evaluation.every_steps=2", "augmentation.crop_size=64",
]  # fmt: skip


@pytest.fixture(scope="module", params=BUILDERS)
def saved_by_transformers(request, models, tmp_path_factory):
    """A folder of one of the families whose checkpoints are read as ours."""
    folder = tmp_path_factory.mktemp(request.param)
    for part in models[request.param]:
        part.save_pretrained(folder)
    return folder


class TestFoldersThatTransformersSaved:
    """Maps, scores and a fine-tuning run, with one line each."""

    def test_from_the_command_line(self, saved_by_transformers, coco, tmp_path):
        model, out = saved_by_transformers, tmp_path / "out"
        run("segment", coco / "val2017", "-m", model, "-o", tmp_path / "maps", "--device", "cpu")
        assert len(json.loads((tmp_path / "maps" / "panoptic.json").read_text())["annotations"]) == 2
        run("evaluate", "-m", model, "-d", coco, "--json", tmp_path / "scores.json", "--device", "cpu")
        scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
        assert 0 <= scores["pq"] <= 1 and 0 <= scores["mean_iou"] <= 1
        changes = [word for change in FEW for word in ("--set", change)]
        run("train", "-r", "finetune", "--model", model, "-d", coco, "-o", out, *changes)
        assert json.loads((out / "config.json").read_text())["model_type"] == "maskcls"
        run("segment", coco / "val2017", "-m", out, "-o", tmp_path / "after", "--device", "cpu")

    def test_from_python(self, saved_by_transformers, coco, tmp_path):
        predict = Predictor.from_pretrained(saved_by_transformers)
        found = predict(picture(), "panoptic", threshold=0.1, overlap_mask_area_threshold=0.0)
        assert found["segments_info"] and found["segmentation"].shape == (48, 80)
        data = open_dataset(coco, "val")
        scores = evaluate(predict, data, Evaluator(predict.image_processor, CLASSES, STUFF, ["panoptic", "semantic"]))
        assert 0 <= scores["pq"] <= 1 and 0 <= scores["mean_iou"] <= 1
        train(load_recipe("finetune", FEW), coco, tmp_path / "out", model=saved_by_transformers)
        before, after = predict.model, MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "out")
        moved = [(old - new).abs().max() for old, new in zip(before.parameters(), after.parameters(), strict=True)]
        assert 0 < max(moved) < 0.05  # two steps at a rate of 1e-4 from the weights of the folder
        assert Predictor.from_pretrained(tmp_path / "out")(picture())["segmentation"].shape == (48, 80)
