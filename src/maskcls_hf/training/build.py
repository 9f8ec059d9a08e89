"""Model and image processor of a recipe."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..data.sample import void_id_of
from ..inference.loading import load_model as load_saved
from ..inference.loading import saved_config, where_to_look
from ..models.checkpoint_manifest import require_whole
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.inference_defaults import checked_inference_defaults, merged_defaults
from ..models.kinds import KINDS
from ..models.modeling_maskcls import MaskClsPreTrainedModel
from ..utils.plain_text import printable
from ..utils.quiet import quiet
from .recipe import Recipe, hints_of_section

logger = logging.get_logger(__name__)

TRAINING_FIELDS = (
    "freeze_batch_norm", "dropout", "deep_supervision", "attend_to_padding", "cross_entropy_weight", "mask_weight",
    "dice_weight", "no_object_weight", "box_weight", "giou_weight", "pq_weight", "instance_discrimination_weight",
    "mask_id_weight", "semantic_weight",
)  # fmt: skip

LAYER_OF_BACKBONE = re.compile(r"\.(layers?|stages)\.")

# Of values that no configuration checks: those of backbones are read by transformers, timm and torch.
BUILDING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError,
    ValueError,
)  # fmt: skip


def build_config(recipe: Recipe, id2label: dict[int, str]) -> PreTrainedConfig:
    """Configuration of the recipe's model for these classes.

    Of a recipe for mask classification that is turned into a per-pixel one (`--set model.kind=per_pixel`), fields that
    only mask classification has are left out, and the other way round.

    Raises:
        ValueError: a value that the configuration refuses; names the recipe.
    """
    known = hints_of_section("model", recipe.model.kind)
    fields = {key: value for key, value in recipe.model.config.items() if key in known}
    if recipe.model.kind == "per_pixel":
        fields.setdefault("semantic_loss_ignore_index", void_id_of(len(id2label)))
    if fields.get("num_queries") == "num_labels":
        fields["num_queries"] = len(id2label)
    label2id = {name: label for label, name in id2label.items()}
    try:
        config_class = KINDS[recipe.model.kind].config_class
        return config_class(**copy.deepcopy(fields), id2label=dict(id2label), label2id=label2id)
    except BUILDING_ERRORS as error:
        raise ValueError(f"Recipe {recipe.name}, section model: {_in_short(error)}") from error


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split()).partition(" Exception raised from ")[0]  # torch adds its stack


def build_model(recipe: Recipe, id2label: dict[int, str], pretrained: bool = True) -> Any:
    """The recipe's model for these classes.

    Args:
        pretrained: load the backbone's weights, if the recipe names a checkpoint; False: everything from scratch.

    Raises:
        ValueError: a wrong value in the recipe, or a checkpoint of another architecture.
        OSError: no such checkpoint here or on the Hub.
    """
    config = build_config(recipe, id2label)
    try:
        model = KINDS[recipe.model.kind].model_class(config)
        getattr(model, "criterion", None)  # made when it is used: its parts are known
    except BUILDING_ERRORS as error:
        raise ValueError(f"Recipe {recipe.name}, section model: {_in_short(error)}") from error
    if pretrained and recipe.model.backbone_checkpoint is not None:
        load_backbone(model, recipe.model.backbone_checkpoint)
    return model


def load_backbone(model: MaskClsPreTrainedModel, checkpoint: str) -> None:
    """Load the backbone's weights from a folder or the Hub, for instance those of an ImageNet classifier.

    Raises:
        OSError: no such checkpoint here or on the Hub.
        ValueError: it holds another architecture than `model.config.backbone_config`.
    """
    backbone = getattr(model.model.backbone, "vit", model.model.backbone)
    advice = "Or train from scratch: --set model.backbone_checkpoint=null"
    if not isinstance(backbone, PreTrainedModel) or backbone.config.model_type == "timm_backbone":
        raise ValueError(
            f"model.backbone_checkpoint={checkpoint!r}: weights of timm are not loaded here, only those of "
            f"transformers' backbones. {advice}"
        )
    require_whole(checkpoint)
    try:
        where = where_to_look(checkpoint)
    except ValueError as error:
        raise OSError(f"model.backbone_checkpoint: {error} {advice}") from error
    try:
        model_type = PreTrainedConfig.get_config_dict(checkpoint, **where)[0].get("model_type")
        if model_type != backbone.config.model_type:
            raise ValueError(
                f"The checkpoint {checkpoint!r} holds a {model_type}, model.backbone_config a "
                f"{backbone.config.model_type}. {advice}"
            )
        with quiet():  # not AutoBackbone.from_pretrained, which asks the Hub first and reads no folders
            loaded, report = cast(Any, type(backbone)).from_pretrained(
                checkpoint, config=copy.deepcopy(backbone.config), output_loading_info=True, **where
            )
    except OSError as error:
        raise OSError(
            f"The backbone's weights {checkpoint!r} (model.backbone_checkpoint) could not be loaded. Give the folder "
            f"of a saved model, or connect to the Hub once. {advice} ({str(error).splitlines()[0]})"
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"The weights of {checkpoint!r} do not have the sizes that model.backbone_config asks for. {advice}"
        ) from error
    except (SafetensorError, UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"The weights of {checkpoint!r} cannot be read ({error}). {advice}") from error
    # Norms of the feature maps belong to backbones; the classifiers that they come from do not have them.
    absent = [name for name in report["missing_keys"] if "hidden_states_norms" not in name]
    result = backbone.load_state_dict(loaded.state_dict(), strict=False)
    unused = [name for name in report["unexpected_keys"] if LAYER_OF_BACKBONE.search(name)]
    unused += [name for name in result.unexpected_keys if not name.startswith("swin.layernorm.")]  # see build_backbone
    wrong = sorted({*absent, *result.missing_keys, *unused})
    if wrong:
        raise ValueError(
            f"The checkpoint {checkpoint!r} holds another architecture than model.backbone_config says: {len(wrong)} "
            f"weights are in one of them only, such as {wrong[0]}. {advice}"
        )


def load_model(recipe: Recipe, folder: str | Path, id2label: dict[int, str]) -> Any:
    """A saved model for fine-tuning. Classes of the same names keep their weights, the others start afresh.

    Of the recipe's `model` section only `TRAINING_FIELDS` count, where it names them; the rest is the saved model's.

    Raises:
        FileNotFoundError: no saved model there.
        ValueError: the recipe is for the other kind of model; weights that are not whole.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"No saved model in {folder}: config.json is missing.")
    model_type = saved_config(folder)["model_type"]
    kind = next((name for name, kind in KINDS.items() if model_type in kind.model_types), "mask_classification")
    if kind != recipe.model.kind:
        raise ValueError(
            f"{folder} holds a model of the kind {kind}, recipe {recipe.name} is for {recipe.model.kind}: "
            f"--set model.kind={kind}"
        )
    fields = {name: value for name, value in recipe.model.config.items() if name in TRAINING_FIELDS}
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
    """Whether, in channels-last layout, a backward pass on a CPU would write past its memory: it has a strided 1x1
    convolution of under 16 channels (github.com/uxlfoundation/oneDNN/issues/6035)."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return any(c.in_channels < 16 and max(c.stride) > 1 and c.kernel_size == (1, 1) for c in convolutions)


def enable_gradient_checkpointing(model: MaskClsPreTrainedModel) -> None:
    """Activations of the transformer layers are computed again in the backward pass: less memory, same gradients."""
    # Its name from transformers 5.23 on; the older one goes in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def build_image_processor(
    recipe: Recipe, model_path: str | Path | None = None, task: str | None = None, **fields: Any
) -> MaskClsImageProcessor:
    """Image processor of the recipe.

    Args:
        model_path: folder of a saved model, whose options hold where the recipe says nothing.
        task: of the data; the model's from then on, unless the recipe says another.
        fields: what the data set's `processor_fields()` gives; they hold above all else.
    """
    per_pixel = recipe.model.kind == "per_pixel"
    options: dict[str, Any] = {"label_format": "semantic" if per_pixel else "segments", **recipe.image_processor}
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
