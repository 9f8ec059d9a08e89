"""Parts of somebody else's: a class and a line, from outside of the package (outside/outside_parts.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskcls_hf import (
    MaskClsConfig,
    MaskClsForUniversalSegmentation,
    register_loss,
    register_matcher,
    register_pixel_decoder,
    register_transformer_decoder,
)
from maskcls_hf.models.configuration_maskcls import PIXEL_DECODERS, REGISTRIES, Registry
from outside import outside_parts
from tiny import maskcls_config, segments

NAMES = {"pixel_decoder": "sum", "transformer_decoder": "mean", "pixel_decoder_options": {"gain": 0.5}}


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is gone after it."""
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    yield
    for kind, registry in REGISTRIES.items():
        registry.clear()
        registry.update(before[kind])


@pytest.fixture
def registered():
    register_pixel_decoder("sum", outside_parts.SumDecoder)
    register_transformer_decoder("mean", outside_parts.MeanDecoder)


def model_with_parts(**fields) -> MaskClsForUniversalSegmentation:
    torch.manual_seed(0)
    return MaskClsForUniversalSegmentation(maskcls_config(**{**NAMES, **fields}))


def run_elsewhere(script: str, *arguments: Path, hidden: bool = False) -> dict:
    """What a process prints that has registered nothing; `hidden`: nor can it import the package."""
    start = "import sys; sys.path.insert(0, sys.argv[1])\nimport json, torch\n"
    if hidden:
        start += "from without_package import Hidden; sys.meta_path.insert(0, Hidden())\nimport transformers\n"
        start += "load = transformers.AutoModelForUniversalSegmentation.from_pretrained\n"
    else:
        start += "import maskcls_hf\nload = maskcls_hf.MaskClsForUniversalSegmentation.from_pretrained\n"
    end = "\nprint(json.dumps(report))"
    folder = arguments[0].parent
    env = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", start + script + end, Path(__file__).parent, *arguments]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


class TestOutsideParts:
    def test_a_model_is_made_and_trained(self, registered):
        model = model_with_parts()
        assert type(model.model.pixel_decoder) is outside_parts.SumDecoder
        assert model.model.pixel_decoder.scale.item() == 0.5  # its option, by its own init_weights
        masks = [torch.zeros(2, 64, 64, dtype=torch.bool) for _ in range(2)]
        masks[0][0, :32], masks[0][1, 32:], masks[1][0, :, :20], masks[1][1, :, 20:] = True, True, True, True
        labels = [torch.tensor([0, 1]), torch.tensor([2, 3])]
        outputs = model(torch.randn(2, 3, 64, 64), masks, labels)
        assert {"loss_mask", "loss_mask_0"} <= set(outputs.loss_dict)  # both layers are supervised
        outputs.loss.backward()
        assert all(p.grad is not None for p in model.model.pixel_decoder.parameters())

    def test_a_padded_batch(self, registered):
        pixel_mask = torch.zeros(2, 64, 64)
        pixel_mask[0], pixel_mask[1, :40, :48] = 1, 1
        outputs = model_with_parts().eval()(torch.randn(2, 3, 64, 64), pixel_mask=pixel_mask)
        assert outputs.masks_queries_logits.shape == (2, 7, 16, 16)
        assert outputs.valid_sizes.tolist() == [[64, 64], [40, 48]]

    def test_it_travels(self, registered, tmp_path):
        """Saved with its files; loaded and saved again where it is trusted, with and without the package."""
        model = model_with_parts().eval()
        model.model.pixel_decoder.scale.data.fill_(0.7)
        model.save_pretrained(tmp_path / "first")
        image = torch.randn(1, 3, 64, 64)
        torch.save(image, tmp_path / "image.pt")
        expected = model(image).masks_queries_logits[0, 0, 0].tolist()
        saved = json.loads((tmp_path / "first/config.json").read_text())
        assert saved["custom_parts"] == {
            "pixel_decoder": {"sum": "outside_parts.SumDecoder"},
            "transformer_decoder": {"mean": "outside_parts.MeanDecoder"},
        }
        script = """
model = load(sys.argv[2], trust_remote_code=True).eval()
model.save_pretrained(sys.argv[3])
logits = model(torch.load(sys.argv[4])).masks_queries_logits[0, 0, 0].tolist()
report = [type(model.model.pixel_decoder).__module__, logits]
"""
        folder = tmp_path / "first"
        for generation, hidden in (("second", False), ("third", True), ("fourth", True)):
            module, logits = run_elsewhere(script, folder, tmp_path / generation, tmp_path / "image.pt", hidden=hidden)
            assert module.startswith("transformers_modules.")
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
            again = tmp_path / generation
            assert {p.name for p in again.glob("*.py")} == {p.name for p in folder.glob("*.py")}
            assert {"outside_parts.py", "outside_blocks.py"} < {p.name for p in again.glob("*.py")}
            assert json.loads((again / "config.json").read_text())["custom_parts"] == saved["custom_parts"]
            folder = again

    def test_without_trust_nothing_of_it_runs(self, registered, tmp_path):
        model_with_parts().save_pretrained(tmp_path / "saved")
        (tmp_path / "saved/outside_parts.py").write_text("raise SystemExit('it ran')")
        script = """
reports = []
for trust in (None, False):
    try:
        load(sys.argv[2], trust_remote_code=trust)
    except ValueError as error:
        reports.append(str(error))
report = reports + [maskcls_hf.MaskClsConfig.from_pretrained(sys.argv[2]).pixel_decoder]
"""
        *errors, name = run_elsewhere(script, tmp_path / "saved")
        assert name == "sum"  # any configuration can be read
        for error in errors:
            assert "pixel_decoder='sum' must be one of ['deformable', 'fpn', 'fpn_encoder', 'per_pixel']" in error
            assert "trust_remote_code=True, which runs its file outside_parts.py" in error
            assert "maskcls_hf.register_pixel_decoder('sum', ...)" in error
        assert len(errors) == 2

    def test_what_is_registered_here_comes_first(self, registered, tmp_path):
        model_with_parts().save_pretrained(tmp_path)
        (tmp_path / "outside_parts.py").write_text("raise SystemExit('it ran')")
        loaded = MaskClsForUniversalSegmentation.from_pretrained(tmp_path, trust_remote_code=True)
        assert type(loaded.model.pixel_decoder) is outside_parts.SumDecoder

    def test_loaded_weights_stay(self, registered, tmp_path):
        model = model_with_parts()
        model.model.pixel_decoder.scale.data.fill_(3.0)
        model.save_pretrained(tmp_path)
        assert MaskClsForUniversalSegmentation.from_pretrained(tmp_path).model.pixel_decoder.scale.item() == 3.0


class TestErrors:
    @pytest.mark.parametrize("registry", REGISTRIES.values(), ids=REGISTRIES)
    def test_the_name_of_a_built_in_part(self, registry):
        for name in list(registry):
            with pytest.raises(ValueError, match=f"{registry.kind} '{name}' is .*: take another name"):
                registry.register(name, outside_parts.SumDecoder)
            registry.register(name, registry[name])  # a module that is run again

    def test_what_is_no_name(self):
        for name in ("", "my decoder", "a.b", 3):
            with pytest.raises(ValueError, match="a name is letters"):
                register_pixel_decoder(name, outside_parts.SumDecoder)

    def test_a_misspelt_name(self):
        config = maskcls_config(pixel_decoder="fpn_encodr")
        with pytest.raises(
            ValueError, match=r"must be one of \[.*Did you mean 'fpn_encoder'\?.*register_pixel_decoder"
        ):
            MaskClsForUniversalSegmentation(config)

    @pytest.mark.parametrize(
        "fields", [{"pixel_decoder_options": {"gian": 2}}, {"transformer_decoder_options": {"depth": 3}}]
    )
    def test_options_that_a_part_does_not_take(self, registered, fields):
        with pytest.raises(ValueError, match="_options={.*}: got an unexpected keyword argument"):
            model_with_parts(**fields)

    def test_built_in_parts_take_none(self):
        with pytest.raises(ValueError, match="pixel_decoder='fpn', .*FPNPixelDecoder, with pixel_decoder_options="):
            MaskClsForUniversalSegmentation(maskcls_config(pixel_decoder_options={"depth": 2}))

    def test_a_class_without_a_file(self, registered, monkeypatch, tmp_path):
        monkeypatch.setattr(outside_parts.SumDecoder, "__module__", "__main__")
        with pytest.raises(
            ValueError, match="pixel_decoder 'sum': SumDecoder is defined in __main__.*put it into a file"
        ):
            model_with_parts().save_pretrained(tmp_path)

    def test_a_file_with_the_name_of_one_of_ours(self, monkeypatch, tmp_path):
        (tmp_path / "losses_of_mine").mkdir()
        file = tmp_path / "losses_of_mine/layers.py"
        file.write_text("of = 1")
        monkeypatch.setattr(outside_parts, "__file__", str(file))
        register_pixel_decoder("sum", outside_parts.SumDecoder)
        with pytest.raises(
            ValueError, match=r"pixel_decoder 'sum' needs layers.py, which is the name of one of our files"
        ):
            model_with_parts(transformer_decoder="standard").save_pretrained(tmp_path / "saved")

    @pytest.mark.parametrize(
        "reference", ["os.path.join", "../evil.Part", "user/repo--file.Part", "file", "a b.c", "file.Part;x", 3]
    )
    def test_references_that_are_no_class_of_a_file(self, reference, tmp_path):
        MaskClsConfig().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["custom_parts"] = {"pixel_decoder": {"mine": reference}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for read in (MaskClsConfig.from_pretrained, MaskClsForUniversalSegmentation.from_pretrained):
            with pytest.raises(ValueError, match="must be file.Class of a part"):
                read(tmp_path, trust_remote_code=True)


def test_registries_are_filled_where_parts_are_defined():
    assert all(isinstance(registry, Registry) for registry in REGISTRIES.values())
    assert set(PIXEL_DECODERS) == {"deformable", "fpn", "fpn_encoder", "per_pixel"}


class TestMatcherAndLoss:
    FIELDS = {
        "matching": "in_order",
        "matching_options": {"start": 2},
        "losses": {"area": 0.5},
        "loss_options": {"area": {"power": 2}},
    }

    @pytest.fixture
    def known(self):
        register_matcher("in_order", outside_parts.InOrderMatcher)
        register_loss("area", outside_parts.AreaLoss)

    def outputs(self, **fields):
        torch.manual_seed(0)
        model = MaskClsForUniversalSegmentation(maskcls_config(**{**self.FIELDS, **fields}))
        masks, labels = segments([(64, 96)] * 2, [3, 2])
        return model, model(torch.randn(2, 3, 64, 96), masks, labels)

    def test_they_train(self, known):
        model, outputs = self.outputs()
        terms = outputs.loss_dict
        assert {"loss_area", "loss_area_0", "loss_area_1"} <= set(terms)
        areas = outputs.masks_queries_logits.sigmoid().mean((2, 3)) ** 2  # (B, N)
        expected = (areas[0, 2:5].sum() + areas[1, 2:4].sum()) / 5
        assert terms["loss_area"].item() == pytest.approx(expected.item(), rel=1e-5)
        total = sum(model.criterion.weights[name.rstrip("_0123")] * term for name, term in terms.items())
        assert model.criterion.weights["loss_area"] == 0.5
        assert outputs.loss.item() == pytest.approx(total.item(), rel=1e-5)
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.segmentation_module.parameters())

    def test_they_travel(self, known, tmp_path):
        model, _ = self.outputs()
        model.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())["custom_parts"]
        assert saved["matcher"] == {"in_order": "outside_parts.InOrderMatcher"}
        assert saved["loss"] == {"area": "outside_parts.AreaLoss"}

    def test_predicting_does_without(self):
        model = MaskClsForUniversalSegmentation(maskcls_config(**self.FIELDS)).eval()
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 96))
        with pytest.raises(ValueError, match="matching='in_order' must be one of"):
            model.criterion  # noqa: B018

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"losses": {"mask": 1.0}, "loss_options": None}, "losses: 'mask' is there already"),
            ({"losses": {"dice": 1.0}, "loss_options": None}, "losses: 'dice' is there already"),
            ({"losses": {"arae": 1.0}, "loss_options": None}, "losses='arae' must be one of .* Did you mean 'area'"),
            ({"loss_options": {"area": {"exponent": 2}}}, "unexpected keyword argument 'exponent'"),
            ({"losses": {"aimless": 1.0}, "loss_options": None}, "loss 'aimless' must have a `normalizer`, one of"),
        ],
    )
    def test_errors(self, known, fields, message):
        register_loss("aimless", type("Aimless", (), {"__init__": lambda self, config: None}))
        with pytest.raises(ValueError, match=message):
            self.outputs(**fields)
