"""What the folder of a saved model says about itself."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..data.files import read_json
from ..inference.loading import saved_config
from ..models.checkpoint_manifest import MODEL_FILES, PROCESSOR_FILES, require_whole
from ..models.kinds import KINDS
from ..utils.yaml_values import read_yaml

PUBLISHED = {kind.config_class.model_type: kind for kind in KINDS.values()}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Recipe:
    """A recipe's `name` (None: unknown) and its `sections`, as in the YAML file."""

    name: str | None
    sections: dict[str, Any]

    def get(self, section: str) -> dict[str, Any]:
        """Keys and values of a section; {} where there are none."""
        return self.sections.get(section) or {}


class SavedModel:
    """The folder of a saved model, whose files are there and whole.

    Args:
        folder: with `config.json`, weights and `preprocessor_config.json`.

    Raises:
        FileNotFoundError: one of them is missing; the message names other models that the folder holds.
        DamagedCheckpoint: an OSError; the files are not those of the checkpoint's manifest.
        ValueError: a model of another package, or a broken configuration.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._check_files()
        for files in (MODEL_FILES, PROCESSOR_FILES):
            require_whole(self.folder, files)
        model_type = saved_config(self.folder)["model_type"]
        self.processor = read_json(self.folder / "preprocessor_config.json")
        if not isinstance(self.processor, dict):
            raise ValueError(f"{self.folder / 'preprocessor_config.json'} must hold the options of an image processor.")
        if model_type not in PUBLISHED:
            raise ValueError(f"{self.folder} holds a {model_type}; this package publishes {', '.join(PUBLISHED)}.")
        self.kind = PUBLISHED[model_type]

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"There is no folder {self.folder}.")
        if not (self.folder / "config.json").is_file():
            inside = sorted(path.parent.name for path in self.folder.glob("*/config.json"))
            hint = f" There are models in its folders {', '.join(inside)}: name one of these." if inside else ""
            raise FileNotFoundError(f"There is no model in {self.folder}: config.json is missing.{hint}")
        if not any((self.folder / name).is_file() for name in WEIGHTS):
            raise FileNotFoundError(f"There are no weights in {self.folder}: model.safetensors is missing.")
        if not (self.folder / "preprocessor_config.json").is_file():
            raise FileNotFoundError(
                f"{self.folder} has no preprocessor_config.json: save the image processor beside the model, "
                "image_processor.save_pretrained(FOLDER)."
            )

    @property
    def finds_segments(self) -> bool:
        """Whether the model classifies masks, and not pixels."""
        return self.kind is KINDS["mask_classification"]

    @cached_property
    def classes(self) -> dict[int, str]:
        """Names of the classes by their ids."""
        return {int(label): name for label, name in sorted(self.full_config.id2label.items())}

    @cached_property
    def full_config(self) -> Any:
        """With the defaults."""
        try:
            return self.kind.config_class.from_pretrained(self.folder)
        except Exception as error:  # fields of a wrong value or type
            raise ValueError(f"{self.folder / 'config.json'} cannot be used: {error}") from error

    @property
    def stuff(self) -> list[int]:
        """Ids of the classes without instances."""
        return list(self.processor.get("label_ids_to_fuse") or [])

    @property
    def task(self) -> str:
        """What the model is foremost for: "semantic" or "panoptic"."""
        return "panoptic" if self.finds_segments and set(self.stuff) != set(self.classes) else "semantic"

    def parameters(self) -> int | None:
        """Their number; None without safetensors files."""
        return count_parameters(self.folder)

    def recipe_path(self) -> Path | None:
        """Of the training that wrote the folder: in it, or above that of a checkpoint."""
        above = [self.folder.absolute().parent] if self.folder.name.startswith("checkpoint-") else []
        return next((path for folder in (self.folder, *above) if (path := folder / "recipe.yaml").is_file()), None)

    def training_state(self) -> dict[str, Any]:
        """Content of `trainer_state.json`: log, steps. Empty without one."""
        path = self.folder / "trainer_state.json"
        return read_json(path) if path.is_file() else {}


def count_parameters(folder: Path) -> int | None:
    """Of a saved model of any kind, from the headers of its safetensors files; None without these."""
    files = sorted(folder.glob("model*.safetensors"))
    total = 0
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if not name.endswith(BUFFERS):
                    total += math.prod(tensors.get_slice(name).get_shape())
    return total if files else None


def read_recipe(path: str | Path) -> Recipe:
    """A recipe from its YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML with sections.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no recipe {path}.")
    sections = read_yaml(path)
    if not isinstance(sections, dict) or not all(
        isinstance(values, dict) or values is None or name == "base" for name, values in sections.items()
    ):
        raise ValueError(f"{path} must hold sections with keys and values.")
    named = re.match(r"# (\S+): all values", path.read_text(encoding="utf-8"))  # as `Recipe.save` writes it
    name = named[1] if named else path.stem
    return Recipe(None if name == "recipe" else name, sections)
