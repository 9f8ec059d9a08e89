"""A saved checkpoint brings its code: here which, and that it can; test_every_family.py loads it elsewhere."""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers import AutoConfig, AutoImageProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import maskcls_hf.models
from checkpoints import image_processor, maskcls_model, save_maskcls, save_perpixel
from maskcls_hf import MaskClsConfig, MaskClsForUniversalSegmentation, MaskClsImageProcessor, PerPixelConfig

PACKAGE = Path(maskcls_hf.models.__file__).parent
THIRD_PARTY = {"PIL", "huggingface_hub", "numpy", "torch", "torchvision", "transformers"}


def files_of(*modules: str) -> set[str]:
    """Names of the files that `modules` need, themselves included."""
    needed = [[PACKAGE / f"{name}.py", *get_relative_import_files(PACKAGE / f"{name}.py")] for name in modules]
    return {Path(path).name for paths in needed for path in paths}


SAVED = ("configuration_maskcls", "image_processing_maskcls", "modeling_maskcls")
TRAVELING = sorted(PACKAGE / name for name in files_of(*SAVED))
assert len(TRAVELING) > 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("remote")
    return SimpleNamespace(root=root, maskcls=save_maskcls(root / "maskcls"), perpixel=save_perpixel(root / "perpixel"))


@pytest.mark.parametrize("path", TRAVELING, ids=lambda path: path.stem)
def test_imports_of_a_traveling_file(path: Path):
    """Flat (`from .name import x`), nothing of ours otherwise, and no other package unguarded."""
    siblings = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            assert not {"maskcls_hf", "importlib"} & set(names), f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"line {node.lineno}: not flat"
            assert (PACKAGE / f"{node.module}.py").is_file(), f"line {node.lineno}: no file {node.module}.py"
            siblings.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] not in ("maskcls_hf", "importlib"), f"line {node.lineno}"
    # transformers looks for imports by a regular expression, which also finds them in docstrings.
    assert set(get_relative_imports(path)) == siblings
    assert set(get_imports(path)) - set(sys.stdlib_module_names) <= THIRD_PARTY


@pytest.mark.parametrize("config_class", [MaskClsConfig, PerPixelConfig])
def test_auto_classes(config_class):
    """What a checkpoint says for remote code is what importing the package registers."""
    maskcls_hf.register()  # a second time
    config = config_class()
    assert type(AutoConfig.for_model(config.model_type)) is config_class
    for auto_class, reference in config_class.auto_classes.items():
        model_class = getattr(transformers, auto_class)._model_mapping[config_class]
        assert reference == f"{model_class.__module__.removeprefix('maskcls_hf.models.')}.{model_class.__name__}"


def test_saved_folder(folders):
    config = json.loads((folders.maskcls / "config.json").read_text())
    assert config["auto_map"] == {"AutoConfig": "configuration_maskcls.MaskClsConfig", **MaskClsConfig.auto_classes}
    processor = json.loads((folders.maskcls / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {"AutoImageProcessor": "image_processing_maskcls.MaskClsImageProcessor"}
    for folder in (folders.maskcls, folders.perpixel):
        assert {path.name for path in folder.glob("*.py")} == {path.name for path in TRAVELING}


def test_auto_map_of_an_earlier_version(folders, tmp_path):
    """Files that were merged since are not named where a loaded checkpoint is saved again; a user's own class stays."""
    config = PerPixelConfig.from_pretrained(folders.perpixel)
    config.auto_map = {
        "AutoConfig": "configuration_perpixel.PerPixelConfig",
        "AutoModelForSemanticSegmentation": "modeling_perpixel.PerPixelForSemanticSegmentation",
        "AutoModel": "mine.Model",
    }
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_maskcls.PerPixelConfig",
        "AutoModelForSemanticSegmentation": "modeling_maskcls.PerPixelForSemanticSegmentation",
        "AutoModel": "mine.Model",
    }


def test_installed_package_comes_first(folders):
    """Where the package is installed, its classes load, and nobody is asked to trust anything."""
    for trust in (None, True):
        model = transformers.AutoModelForUniversalSegmentation.from_pretrained(folders.maskcls, trust_remote_code=trust)
        assert type(model) is MaskClsForUniversalSegmentation
        processor = AutoImageProcessor.from_pretrained(folders.maskcls, trust_remote_code=trust)
        assert type(processor) is MaskClsImageProcessor


def test_push_to_hub_sends_the_code(monkeypatch):
    """What `push_to_hub` would upload; no network."""
    sent: set[str] = set()

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def create_commit(self, operations, **kwargs):
            sent.update(operation.path_in_repo for operation in operations)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: SimpleNamespace(save=lambda path: 0)
    )
    maskcls_model().push_to_hub("someone/model")
    image_processor().push_to_hub("someone/model")
    code = files_of("configuration_maskcls", "modeling_maskcls", "image_processing_maskcls")
    assert sent == code | {"config.json", "model.safetensors", "preprocessor_config.json"}
