"""Models as commands load them: whole, at once, without code of theirs."""

import json
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MaskFormerForInstanceSegmentation, PreTrainedConfig, SegformerConfig
from typer.testing import CliRunner

import maskcls_hf.inference.loading
from checkpoints import save_maskcls
from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.cli.main import app
from maskcls_hf.convert import save_as_transformers
from maskcls_hf.convert.per_pixel import load as load_per_pixel
from maskcls_hf.inference.loading import load_image_processor, load_model, saved_config, where_to_look
from maskcls_hf.training import load_recipe
from maskcls_hf.training.build import load_model as load_for_training

WEIGHT = "segmentation_module.class_predictor.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_maskcls(tmp_path_factory.mktemp("loading") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_weights(change):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    return damage


def other_config(**fields):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return damage


def index(content: str):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")


def foreign_shard(folder: Path) -> None:
    """The first of two files holds all weights, of another model of the same shape, in place of its own."""
    weights = load_file(folder / "model.safetensors")
    MaskClsForUniversalSegmentation.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    first = min(folder.glob("model-00001-*"))
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, first, {"format": "pt"})


DAMAGES = {
    "all missing": (change_weights(lambda w: (w.clear(), w.update(other=torch.zeros(3)))), "lack .* entries"),
    "none": (change_weights(lambda w: w.clear()), "lack .* entries"),
    "one missing": (change_weights(lambda w: w.pop(WEIGHT)), f"lack 1 entries, such as {WEIGHT}"),
    "left over": (change_weights(lambda w: w.update(other=torch.zeros(3))), "have unknown 1 entries, such as other"),
    "shape": (change_weights(lambda w: w.update({WEIGHT: w[WEIGHT][:1]})), f"do not fit its config.json: {WEIGHT}"),
    "nan": (change_weights(lambda w: w[WEIGHT].view(-1)[:1].fill_(math.nan)), f"{WEIGHT} holds NaN"),
    "integers": (change_weights(lambda w: w.update({WEIGHT: w[WEIGHT].to(torch.int8)})), f"holds {WEIGHT} as I8"),
    "truth values": (change_weights(lambda w: w.update({WEIGHT: w[WEIGHT] > 0})), f"holds {WEIGHT} as BOOL"),
    "foreign shard": (foreign_shard, "holds other weights than model.safetensors.index.json says"),
    "model_type of no text": (other_config(model_type=["maskcls"]), "does not hold the fields"),
    "empty file": (write("model.safetensors", b""), "cannot be read"),
    "cut file": (
        lambda f: write("model.safetensors", (f / "model.safetensors").read_bytes()[:-9])(f),
        "cannot be read",
    ),
    "lost shard": (
        index('{"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        "00002-of-00002",
    ),
    "shard outside": (index('{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}'), "outside of its folder"),
    "broken index": (index("{}"), "is no index of weights"),
    "fewer layers": (other_config(decoder_layers=1), "have unknown"),
    "more layers": (other_config(decoder_layers=9), "lack"),
    "other size, to be ignored": (other_config(mask_feature_size=99, ignore_mismatched_sizes=True), "do not fit"),
    "other package": (other_config(model_type="bert"), "model_type 'bert'"),
    "no configuration": (write("config.json", b"[]"), "neither the folder of a saved model"),
    "pickle that runs code": (pickled, "cannot be read: they hold more than tensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models_are_refused(name, folder):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message):
        load_model(folder)
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b"{", b"\xff\xfe", b'{"size": "big"}', b'{"size": {"height": -1}}']
)
def test_a_damaged_image_processor_is_no_missing_one(content, folder, tmp_path):
    (folder / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="preprocessor_config.json in"):
        load_image_processor(folder)
    for command in (["convert", folder, tmp_path / "out", "--to-transformers"], ["convert", folder, tmp_path / "out"]):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 1 and "Error: The preprocessor_config.json in" in result.stderr, result.output
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        write("config.json", b"[]"),
        write("config.json", b"null"),
        write("preprocessor_config.json", b"[]"),
        other_config(dtype="evil"),
        other_config(quantization_config=3),
        other_config(id2label=3),
    ],
)
def test_push_ends_in_a_line_for_a_damaged_configuration(damage, folder, tmp_path):
    damage(folder)
    result = CliRunner().invoke(app, ["push", str(folder), "me/x", "--dry-run", str(tmp_path / "out")])
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    assert "config.json" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["all missing", "empty file"])
def test_no_command_goes_on_with_random_weights(name, folder, tmp_path):
    DAMAGES[name][0](folder)
    (tmp_path / "images").mkdir()
    shutil.copy(Path(__file__).parent.parent / "docs" / "overview.png", tmp_path / "images" / "a.png")
    out = tmp_path / "out"
    for command in (
        ["segment", tmp_path / "images", "-m", folder, "-o", out],
        ["convert", folder, out, "--to-transformers"],
        ["convert", folder, out],
        ["push", folder, "me/x", "--dry-run", out],
    ):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 1 and "The weights in" in result.stderr, (command[0], result.output)
        assert not out.exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="The weights in"):
        load_for_training(load_recipe("camvid"), folder, {0: "a"})


def test_the_class_itself_warns_as_transformers_does(folder):
    DAMAGES["one missing"][0](folder)
    _, report = MaskClsForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {WEIGHT}


def test_new_classes_in_fine_tuning_are_said(folder, caplog):
    load_for_training(load_recipe("camvid"), folder, {0: "sky", 1: "cat\x1b"})
    assert "start with random weights: cat\\x1b." in caplog.text


def test_heads_of_other_losses_come_and_go(folder, caplog):
    with_head = load_model(folder, semantic_weight=1.0)
    assert "with random weights: segmentation_module.semantic_predictor" in caplog.text
    with_head.save_pretrained(folder)
    assert load_model(folder, semantic_weight=0.0).segmentation_module.semantic_predictor is None
    DAMAGES["one missing"][0](folder)
    with pytest.raises(ValueError, match=f"lack 1 entries, such as {WEIGHT}"):
        load_model(folder, semantic_weight=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("class_predictor.weight"), "lack"),
        (lambda w: w.update(other=torch.zeros(3)), "have unknown 1 entries, such as other"),
        (lambda w: w.update({"class_predictor.weight": w["class_predictor.weight"][:1]}), "lack|do not fit"),
    ],
)
def test_damaged_models_of_transformers_are_refused(change, message, saved, tmp_path):
    save_as_transformers(saved, tmp_path)
    assert isinstance(load_model(tmp_path), MaskClsForUniversalSegmentation)
    change_weights(change)(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="lack|have unknown|do not fit"):
        load_model(tmp_path, MaskFormerForInstanceSegmentation)


# -- code of checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A folder whose code leaves a mark, and a user who agrees to everything."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run code"))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return tmp_path / "evil"


AUTO_MAP = {name: "evil.E" for name in ("AutoConfig", "AutoModel", "AutoBackbone", "AutoModelForSemanticSegmentation")}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "evil", "auto_map": AUTO_MAP},
        {"model_type": "bert", "auto_map": AUTO_MAP},
        {"model_type": "segformer", "auto_map": AUTO_MAP, "id2label": {"0": "a", "1": "b"}},
        {"model_type": "upernet", "backbone_config": {"model_type": "bert", "auto_map": AUTO_MAP}},
        {"model_type": "maskcls", "backbone_config": {"model_type": "bert", "auto_map": AUTO_MAP}},
        {"model_type": "maskcls", "pixel_decoder": "per_pixel", "backbone_config": {
            "model_type": "upernet", "backbone_config": {"model_type": "bert", "auto_map": AUTO_MAP}}},
        {"model_type": "maskformer", "mask_feature_size": 32, "fpn_feature_size": 32, "backbone_config": {
            "model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "auto_map": AUTO_MAP}},
    ],
)  # fmt: skip
def test_code_of_a_checkpoint_is_never_run(config, evil, tmp_path):
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "E", "auto_map": {"AutoImageProcessor": "evil.E"}})
    )
    save_file({"a": torch.zeros(1)}, evil / "model.safetensors", {"format": "pt"})
    (tmp_path / "a.png").write_bytes(b"")
    for command in (
        ["convert", evil, tmp_path / "c"],
        ["segment", tmp_path / "a.png", "-m", evil, "-o", tmp_path / "s"],
    ):
        result = CliRunner().invoke(app, list(map(str, command)), input="y\n" * 9)
        assert result.exit_code == 1 and "[y/N]" not in result.output
        assert isinstance(result.exception, SystemExit) and "code of a checkpoint" not in str(result.exception)
        assert len(result.stderr) < 1000, result.stderr


def test_our_own_folders_name_code_and_load(folder):
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert isinstance(load_model(folder), MaskClsForUniversalSegmentation)


def test_a_processor_of_code_is_refused(evil):
    SegformerConfig(num_labels=2).save_pretrained(evil)
    with pytest.raises((ValueError, OSError)):
        load_per_pixel(evil)


# -- names without a model -------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """The Hub is out of reach, and who asks it all the same waits for long."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["/no/such/folder", "./runs/x", "runs/a/b", "../x", "a\\b", "x y", Path("runs/x")])
def test_paths_are_never_asked_for(name, monkeypatch):
    monkeypatch.setattr(maskcls_hf.inference.loading, "hub_answers", lambda: pytest.fail("asks the Hub"))
    with pytest.raises(ValueError, match="there is no such folder"):
        saved_config(name)


@pytest.mark.parametrize("name", ["runs/nothing", "facebook/maskformer-swin-tiny-ade", "nothing"])
def test_without_a_network_it_is_said_at_once(name, no_network):
    start = time.monotonic()
    with pytest.raises(ValueError, match="the Hub cannot be reached"):
        load_model(name)
    result = CliRunner().invoke(app, ["convert", name, "nowhere"])
    assert result.exit_code == 1 and "the Hub cannot be reached" in result.stderr
    assert time.monotonic() - start < 5


def test_a_proxy_is_asked_in_place_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setattr("socket.create_connection", lambda place, timeout: nullcontext(asked.append(place)))
    assert maskcls_hf.inference.loading.hub_answers()
    assert asked == [("proxy.example", 3128)]


def test_folders_need_no_network(saved, no_network):
    assert where_to_look(saved) == {} and saved_config(saved)["model_type"] == "maskcls"
    assert PreTrainedConfig.get_config_dict(saved)[0]["model_type"] == "maskcls"
