"""Model and image processor of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..convert.pretrained_backbones import open_backbone
from ..data.sample import void_id_of
from ..inference.loading import load_model as load_saved
from ..inference.loading import saved_config
from ..models.checkpoint_manifest import DamagedCheckpoint
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.inference_defaults import checked_inference_defaults, merged_defaults
from ..models.kinds import KINDS
from ..models.modeling_maskcls import MaskClsPreTrainedModel
from ..utils.plain_text import printable
from .recipe import Recipe, hints_of_section

logger = logging.get_logger(__name__)

_TRAINING_FIELDS = (
    "freeze_batch_norm", "freeze_backbone", "dropout", "deep_supervision", "attend_to_padding", "cross_entropy_weight",
    "mask_weight", "dice_weight", "no_object_weight", "box_weight", "giou_weight", "pq_weight",
    "instance_discrimination_weight", "mask_id_weight", "semantic_weight",
)  # fmt: skip

# Of values that no configuration checks: those of backbones are read by transformers, timm and torch.
_BUILDING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip


def build_config(recipe: Recipe, id2label: dict[int, str]) -> PreTrainedConfig:
    """Configuration of the recipe's model for these classes.

    Without a `backbone_config` the backbone's is that of its checkpoint. Of a recipe for mask classification that is
    turned into a per-pixel one (`--set model.kind=per_pixel`), fields that only mask classification has are left out,
    and the other way round.

    Args:
        recipe: its section `model` counts.
        id2label: names of the classes 0..K-1.

    Raises:
        ValueError: a value that the configuration refuses; names the recipe.
        OSError: no such checkpoint here or on the Hub.
    """
    known = hints_of_section("model", recipe.model.kind)
    fields = {key: value for key, value in recipe.model.config.items() if key in known}
    if recipe.model.kind == "per_pixel":
        fields.setdefault("semantic_loss_ignore_index", void_id_of(len(id2label)))
    if fields.get("num_queries") == "num_labels":
        fields["num_queries"] = len(id2label)
    if fields.get("backbone_config") is None and recipe.model.backbone_checkpoint is not None:
        with _pretrained_backbone(recipe) as backbone:
            fields["backbone_config"] = backbone.config()
    label2id = {name: label for label, name in id2label.items()}
    try:
        config_class = KINDS[recipe.model.kind].config_class
        config: PreTrainedConfig = config_class(**copy.deepcopy(fields), id2label=dict(id2label), label2id=label2id)
    except _BUILDING_ERRORS as error:
        raise ValueError(f"Recipe {recipe.name}, section model: {_in_short(error)}") from error
    return config


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split()).partition(" Exception raised from ")[0]  # torch adds its stack


def build_model(recipe: Recipe, id2label: dict[int, str], pretrained: bool = True) -> Any:
    """The recipe's model for these classes.

    Args:
        recipe: its section `model` counts.
        id2label: names of the classes 0..K-1.
        pretrained: load the backbone's weights, if the recipe names a checkpoint; False: everything from scratch.

    Raises:
        ValueError: a wrong value in the recipe, or a checkpoint of another architecture.
        OSError: no such checkpoint here or on the Hub.
    """
    config = build_config(recipe, id2label)
    try:
        model = KINDS[recipe.model.kind].model_class(config)
        getattr(model, "criterion", None)  # made when it is used: its parts are known
    except _BUILDING_ERRORS as error:
        raise ValueError(f"Recipe {recipe.name}, section model: {_in_short(error)}") from error
    if pretrained and recipe.model.backbone_checkpoint is not None:
        with _pretrained_backbone(recipe) as backbone:
            backbone.load_into(model)
    return model


@contextmanager
def _pretrained_backbone(recipe: Recipe) -> Iterator[Any]:
    """What the recipe names in `backbone_checkpoint`; an error with it names the key, and how to do without."""
    where = f"Recipe {recipe.name}, model.backbone_checkpoint={recipe.model.backbone_checkpoint!r}"
    advice = "Or train from scratch: --set model.backbone_checkpoint=null"
    try:
        yield open_backbone(str(recipe.model.backbone_checkpoint), recipe.model.backbone_weights)
    except DamagedCheckpoint:
        raise
    except OSError as error:
        raise OSError(f"{where}: {error} {advice}") from error
    except (ValueError, ImportError) as error:
        raise ValueError(f"{where}: {error} {advice}") from error


def load_model(recipe: Recipe, folder: str | Path, id2label: dict[int, str]) -> Any:
    """A saved model for fine-tuning. Classes of the same names keep their weights, the others start afresh.

    Of the recipe's `model` section only `_TRAINING_FIELDS` count, where it names them; the rest is the saved model's.

    Args:
        recipe: see above.
        folder: of the saved model.
        id2label: names of the classes of the data.

    Raises:
        FileNotFoundError: no saved model there.
        ValueError: the recipe is for the other kind of model; weights that are not whole.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"No saved model in {folder}: config.json is missing.")
    model_type = saved_config(folder)["model_type"]
    kind = next((name for name, kind in KINDS.items() if model_type in kind.model_types), None)
    if kind is None:
        raise ValueError(
            f"{folder} has model_type {model_type!r}, of transformers, which this package may predict with but does "
            "not train: it has neither its losses nor a way to save it. Fine-tune one of "
            f"{', '.join(KINDS[recipe.model.kind].model_types)}, or this one by transformers' own Trainer."
        )
    if kind != recipe.model.kind:
        raise ValueError(
            f"{folder} holds a model of the kind {kind}, recipe {recipe.name} is for {recipe.model.kind}: "
            f"--set model.kind={kind}"
        )
    fields = {name: value for name, value in recipe.model.config.items() if name in _TRAINING_FIELDS}
    model = load_saved(folder, **fields)
    getattr(model, "criterion", None)  # made when it is used: its parts are known
    if model.config.id2label == id2label:
        return model
    known = set(model.config.id2label.values())
    fresh = [name for name in id2label.values() if name not in known]
    if fresh:
        logger.warning(
            f"Classes of the data that the model in {printable(folder)} does not know start with random weights: "
            f"{', '.join(map(printable, fresh))}."
        )
    return model.reset_classes(id2label)


def upsets_onednn(model: nn.Module) -> bool:
    """Whether, in channels-last layout, a backward pass on a CPU would write past its memory.

    So it does for a strided 1x1 convolution of under 16 channels (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(c.in_channels < 16 and max(c.stride) > 1 and c.kernel_size == (1, 1) for c in convolutions)


def enable_gradient_checkpointing(model: MaskClsPreTrainedModel) -> None:
    """Activations of the transformer layers are computed again in the backward pass: less memory, same gradients."""
    # Its name from transformers 5.23 on; the older one goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_image_processor(
    recipe: Recipe,
    model_path: str | Path | None = None,
    task: str | None = None,
    *,
    pretrained: bool = True,
    **fields: Any,
) -> MaskClsImageProcessor:
    """Image processor of the recipe.

    Args:
        recipe: its section `image_processor` counts, and the thresholds of `evaluation`.
        model_path: folder of a saved model, whose options hold where the recipe says nothing.
        task: of the data; the model's from then on, unless the recipe says another.
        pretrained: without a saved model, those of the backbone's checkpoint hold there, if the recipe names one.
        fields: what the data set's `processor_fields()` gives; they hold above all else.

    Raises:
        ValueError: an option that the image processor refuses; names the recipe.
    """
    per_pixel = recipe.model.kind == "per_pixel"
    options: dict[str, Any] = {"label_format": "semantic" if per_pixel else "segments", **recipe.image_processor}
    if model_path is None and pretrained and recipe.model.backbone_checkpoint is not None:
        with _pretrained_backbone(recipe) as backbone:
            options = backbone.processor_fields() | options
    said = options.pop("inference_defaults", None) or {}
    options |= fields
    try:
        if model_path is not None and (Path(model_path) / "preprocessor_config.json").is_file():
            processor = MaskClsImageProcessor.from_pretrained(model_path, **options)
        else:
            processor = MaskClsImageProcessor(**options)
        thresholds = {
            "threshold": recipe.evaluation.threshold,
            "overlap_mask_area_threshold": recipe.evaluation.overlap_threshold,
        }
        layers = (processor.inference_defaults, {"task": task, "panoptic": thresholds}, said)
        processor.inference_defaults = checked_inference_defaults(merged_defaults(*layers))
        return processor
    except (TypeError, ValueError) as error:
        raise ValueError(f"Recipe {recipe.name}, section image_processor: {error}") from error
