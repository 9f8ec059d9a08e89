"""Configurations: strings choose the parts, numbers their sizes."""

import dataclasses
import inspect
import math
import operator
import os
import re
import reprlib
from collections.abc import Callable
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from .options import open_backbone, plain, similar, warn_about_unused

logger = logging.get_logger(__name__)


class Registry(dict[str, Any]):
    """Parts of one kind by their names, empty here: a part registers where it is defined, whoever defines it.

    Args:
        kind: "pixel_decoder", "transformer_decoder", "matcher" or "loss".

    Examples:
        >>> matchers = Registry("matcher")
        >>> class FirstQueries: ...
        >>> matchers.register("first_queries", FirstQueries)
        >>> sorted(matchers)
        ['first_queries']
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str, part: Any) -> None:
        """Make `part`, a class, known by `name`; configurations, recipes and `--set` then take the name.

        Args:
            name: letters, digits and underscores.
            part: called with the configuration, of a pixel decoder also with the channels of the backbone's maps, of a
                transformer decoder with those of its context; and with its own options. What it must do then stands at
                the head of pixel_decoders.py, transformer_decoders.py, matching.py or losses.py.

        Raises:
            `ValueError`: the name is none, or that of another part.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{self.kind}: a name is letters, digits and underscores, got {name!r}.")
        known = self.get(name)
        if known is not None and _qualified_name(known) != _qualified_name(part):  # a module may be run twice
            raise ValueError(f"{self.kind} {name!r} is {_qualified_name(known)}: take another name.")
        self[name] = part

    def build(self, config: PreTrainedConfig, field: str, *inputs: Any) -> Any:
        """The part that `config` names in `field`, made of the configuration, `inputs` and its own options.

        Args:
            config: has its options in the field `<field>_options`.
            field: such as "matching".
            inputs: what the part gets beside the configuration.

        Raises:
            `ValueError`: nothing is known by that name, or it does not take the options.
        """
        name = getattr(config, field)
        options = getattr(config, f"{field}_options", None) or {}
        return self.make(name, (config, *inputs), options, field, custom_file(config, self.kind, name))

    def make(
        self, name: str, inputs: tuple[Any, ...], options: dict[str, Any], field: str, file: str | None = None
    ) -> Any:
        """The same for a `name`; `file` is the one of a checkpoint that has the part.

        Args:
            name: that the part was registered by.
            inputs: what the part is called with, in order.
            options: its further arguments, by their names.
            field: of the configuration, which messages name.
            file: of a checkpoint; None: there is none.

        Raises:
            `ValueError`: as of [`build`].
        """
        part = self.get(name)
        if part is None:
            meant = similar(name, list(self))
            hint = f" Did you mean {meant!r}?" if meant else ""
            mend = f"register the class before, by maskcls_hf.register_{self.kind}({name!r}, ...)"
            if file is not None:
                mend = f"load the checkpoint with trust_remote_code=True, which runs its file {file}, or {mend}"
            raise ValueError(f"{field}={name!r} must be one of {sorted(self)}.{hint} Or {mend}.")
        try:
            inspect.signature(part).bind(*inputs, **options)
        except TypeError as error:
            raise ValueError(
                f"{field}={name!r}, {_qualified_name(part)}, with {field}_options={options}: {error}."
            ) from error
        return part(*inputs, **options)


def _qualified_name(part: Any) -> str:
    return f"{part.__module__}.{part.__qualname__}"


PIXEL_DECODERS = Registry("pixel_decoder")
TRANSFORMER_DECODERS = Registry("transformer_decoder")
MATCHERS = Registry("matcher")
LOSSES = Registry("loss")
register_pixel_decoder = PIXEL_DECODERS.register
register_transformer_decoder = TRANSFORMER_DECODERS.register
register_matcher = MATCHERS.register
register_loss = LOSSES.register
REGISTRIES = {registry.kind: registry for registry in (PIXEL_DECODERS, TRANSFORMER_DECODERS, MATCHERS, LOSSES)}


def custom_file(config: PreTrainedConfig, kind: str, name: str) -> str | None:
    """The file of a checkpoint that has a part of somebody's own; None: it has none such.

    Args:
        config: its `custom_parts` say which files there are.
        kind: of a registry, such as "matcher".
        name: of the part.
    """
    reference = (getattr(config, "custom_parts", None) or {}).get(kind, {}).get(name)
    return None if reference is None else f"{reference.split('.')[0]}.py"


COMPATIBILITIES = ("exact", "transformers", "paper")
OF_COMPATIBILITY = ("attend_to_padding",)  # fields that follow from it where they are not given

# Terms of the matching cost and the fields of their weights.
MATCHING_COSTS = {
    "bipartite": {"class": "cross_entropy_weight", "mask": "mask_weight", "dice": "dice_weight"},
    "box": {"class": "cross_entropy_weight", "box": "box_weight", "giou": "giou_weight"},
}

# Readers of other implementations' checkpoints, which `maskcls_hf.convert` adds where the package is installed:
# `model_type` -> (their configuration -> fields of ours), and
# `model_type` -> (path, options of `from_pretrained` -> parameters by our names, and names that are unknown).
CONFIG_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
CHECKPOINT_READERS: dict[str, Callable[[Any, dict[str, Any]], tuple[dict[str, Any], set[str]]]] = {}


def what_reads(model_type: str) -> str:
    """What a user with a saved model of this type can load it with, as a sentence without its full stop."""
    from transformers.models.auto import modeling_auto as auto

    if model_type == PerPixelConfig.model_type:
        return "PerPixelForSemanticSegmentation reads it"
    if model_type == MaskClsConfig.model_type or model_type in CONFIG_READERS:
        return "MaskClsForUniversalSegmentation reads it"
    if model_type in auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES:
        return "AutoModelForUniversalSegmentation of transformers reads it, and maskcls_hf.Predictor runs it as it is"
    if model_type in auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        return "It classifies pixels: maskcls convert, or maskcls_hf.convert.from_per_pixel, makes one of ours of it"
    if model_type in auto.MODEL_FOR_BACKBONE_MAPPING_NAMES:
        return "It is a backbone: from_backbone makes a new model over it"
    return "AutoModel of transformers may read it"


# Files of checkpoints saved by earlier versions.
FORMER_FILES = ("configuration_perpixel.", "modeling_perpixel.")


class SegmentationNetworkConfig(PreTrainedConfig):
    """Fields that mask classification and its per-pixel baselines share: backbone, pixel decoder, transformer.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Any backbone of `AutoBackbone` with stages, which `out_features` lists (timm's: `out_indices`), or a plain
            ViT (DINOv2, DINOv3, timm's), of whose last map a pyramid is made; see `backbones.build_backbone`. Default:
            ResNet-50, all four stages (paper Section 4.1). `from_backbone` reads that of pretrained weights.
        pixel_decoder (`str`, defaults to `"fpn"`):
            `"fpn"`, or `"fpn_encoder"` for the FPN over transformer encoder layers that the paper uses for COCO
            panoptic with ResNets (Appendix A), or `"per_pixel"`: `backbone_config` is that of a whole per-pixel model,
            whose own decoder serves (`maskcls_hf.convert.from_per_pixel`).
        transformer_decoder (`str`, defaults to `"standard"`): the paper's, which is DETR's.
        num_queries (`int`, defaults to 100): N, the number of predicted segments (Section 4.1).
        hidden_size (`int`, defaults to 256): channels of the transformer decoder (Section 4.1, as DETR).
        num_attention_heads (`int`, defaults to 8): heads of all attention layers (as DETR).
        encoder_layers (`int`, defaults to 6): transformer encoder layers of `"fpn_encoder"` (Appendix A).
        encoder_ffn_dim (`int`, defaults to 2048): their feed-forward size (as DETR).
        decoder_layers (`int`, defaults to 6): transformer decoder layers (Section 4.1).
        decoder_ffn_dim (`int`, defaults to 2048): their feed-forward size (as DETR).
        dropout (`float`, *optional*): dropout of the transformer layers. None: 0.1 (as DETR), or 0 with the
            `compatibility` `"paper"` and `"masked_attention"`, as in Mask2Former's code.
        fpn_feature_size (`int`, defaults to 256): channels of the pixel decoder (Section 4.1).
        mask_feature_size (`int`, defaults to 256): C_E, channels of per-pixel and mask embeddings (Section 4.1).
        mask_kernel_size (`int`, defaults to 3): kernel of the convolution that makes the per-pixel embeddings; odd.
        mask_upsampling (`int`, defaults to 1): factor by which `"per_pixel"` upsamples its mask logits.
        deep_supervision (`bool`, defaults to `True`): the loss counts every decoder layer (Appendix A).
        attend_to_padding (`bool`, *optional*):
            `True` gives the behavior of the paper's code, which imported checkpoints were trained with: padding is
            seen by attention and normalization, padded and void pixels are negatives in the loss. None: `False`, or
            `True` with a `compatibility` other than `"exact"`.
        freeze_batch_norm (`bool`, defaults to `False`):
            Keep the statistics and affine parameters of the backbone's batch norms as loaded (the paper's ResNets).
        freeze_backbone (`bool`, defaults to `False`):
            Keep all of the backbone as loaded, without its dropout: what is new over it learns alone. Of a plain ViT
            the pyramid over it learns, with `"encoder_only"` the queries, the upscaling blocks and the heads.
        init_xavier_std (`float`, defaults to 1.0): gain of the Xavier initialization of the transformer (as DETR).
        pixel_decoder_options, transformer_decoder_options (`dict`, *optional*): further arguments of parts of
            somebody's own (`maskcls_hf.register_pixel_decoder`, `register_transformer_decoder`); ours have none.
        custom_parts (`dict`, *optional*): written where a model is saved, {kind: {name: "file.Class"}}: the files
            beside the checkpoint that have those parts, loaded by `from_pretrained(..., trust_remote_code=True)`.
    """

    _auto_class = "AutoConfig"  # saved with the code that reads it
    auto_classes: ClassVar[dict[str, str]] = {}  # Auto class -> file and class that it stands for
    sub_configs = {"backbone_config": AutoConfig}
    attribute_map = {"num_hidden_layers": "decoder_layers"}

    backbone_config: dict | PreTrainedConfig | None = None  # type: ignore[type-arg]  # checked as it stands
    pixel_decoder: str = "fpn"
    transformer_decoder: str = "standard"
    num_queries: int = 100
    hidden_size: int = 256
    num_attention_heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    dropout: float | int | None = None
    fpn_feature_size: int = 256
    mask_feature_size: int = 256
    mask_kernel_size: int = 3
    mask_upsampling: int = 1
    deep_supervision: bool = True
    attend_to_padding: bool | None = None
    freeze_batch_norm: bool = False
    freeze_backbone: bool = False
    init_xavier_std: float | int = 1.0
    pixel_decoder_options: Any = None  # these three are dicts
    transformer_decoder_options: Any = None
    custom_parts: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        name, fields = type(self).__name__, [field.name for field in dataclasses.fields(self)]
        for field in fields:
            setattr(self, field, plain(getattr(self, field)))
            if field in PART_FIELDS and getattr(self, field) is None:
                setattr(self, field, {})
        kwargs = plain(kwargs)
        _refuse_fields_of_maskformer(kwargs, name)
        warn_about_unused(kwargs, {*fields, *OF_TRANSFORMERS}, name)
        self.backbone_config = as_backbone_config(self.backbone_config)
        classes: Any = self.id2label
        if classes is None and self.label2id:
            classes = {label: name for name, label in self.label2id.items()}
        if classes is not None:
            self.id2label = checked_classes(classes)
            of_names = {name: label for label, name in self.id2label.items()}
            if self.label2id not in (None, of_names):
                logger.warning(f"{name}: label2id contradicts id2label, and is made from it.")
            self.label2id = of_names
            if kwargs.get("num_labels") not in (None, len(self.id2label)):
                raise ValueError(f"{name}: num_labels={kwargs['num_labels']} but id2label has {len(self.id2label)}.")
        elif kwargs.get("num_labels") is not None:
            _check_number_of("num_labels", kwargs["num_labels"], name, integer=True, minimum=1)
        super().__post_init__(**kwargs)
        self.check_fields()

    @classmethod
    def from_backbone(cls, name_or_path: str | os.PathLike[str], **fields: Any) -> Any:
        """A configuration with the `backbone_config` of a pretrained backbone, which the model's `from_backbone` loads.

        Args:
            name_or_path: as in `MaskClsForUniversalSegmentation.from_backbone`.
            fields: others of this class, such as `id2label`.
        """
        fields["backbone_config"] = fields.get("backbone_config") or open_backbone(name_or_path).config()
        return cls(**fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; `kwargs` are checked as those of the class are."""
        _refuse_fields_of_maskformer(kwargs, cls.__name__)
        fields = {field.name for field in dataclasses.fields(cls)}
        own = {name: kwargs.pop(name) for name in fields & set(kwargs) - {"backbone_config", "dtype"}}
        if "compatibility" in own:  # sets anew what follows from it
            config_dict = {key: value for key, value in config_dict.items() if key not in OF_COMPATIBILITY}
        if "id2label" in own or kwargs.get("num_labels") is not None:  # in place of the saved ones
            config_dict = {key: value for key, value in config_dict.items() if key not in ("id2label", "label2id")}
        if not kwargs.get("return_unused_kwargs"):
            warn_about_unused(kwargs, {*fields, *OF_TRANSFORMERS, *OF_LOADING}, cls.__name__)
        return super().from_dict({**config_dict, **own}, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, of models of this class alone."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        cls.require_readable(config_dict, pretrained_model_name_or_path)
        return config_dict, kwargs

    @classmethod
    def require_readable(cls, config_dict: dict[str, Any], where: Any) -> None:
        """Raise `ValueError` for a configuration of models of another kind, whose weights would find no place."""
        own = [name for base in cls.__mro__ if (name := getattr(base, "model_type", ""))]
        model_type = config_dict.get("model_type") or own[0]
        known = [*dict.fromkeys(own), *(CONFIG_READERS if MaskClsConfig.model_type in own else ())]
        if model_type not in known:
            raise ValueError(
                f"{where} has model_type {model_type!r}, {cls.__name__} and its models read {', '.join(known)}. "
                f"{what_reads(model_type)}."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Also names the classes that `trust_remote_code=True` loads; transformers itself would name one only."""
        loaded = getattr(self, "auto_map", None) or {}
        kept = {name: place for name, place in loaded.items() if not str(place).startswith(FORMER_FILES)}
        self.auto_map = self.auto_classes | kept
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def check_fields(self) -> None:
        """Raise `ValueError` for the first wrong field; the message names field, value and choices."""
        # Any name, as a card must be able to read any configuration: who builds the part knows whether it is there.
        _check_names(self, "pixel_decoder", "transformer_decoder")
        check_options(self, "pixel_decoder_options", "transformer_decoder_options", "custom_parts")
        if self.attend_to_padding is None:
            self.attend_to_padding = getattr(self, "compatibility", "exact") != "exact"
        if self.dropout is None:
            of_mask2former = (getattr(self, "compatibility", ""), self.transformer_decoder)
            self.dropout = 0.0 if of_mask2former == ("paper", "masked_attention") else 0.1
        check_references(self.custom_parts)
        for name in POSITIVE_INTEGERS:
            most = MOST_LAYERS if name.endswith("_layers") else float("inf")
            _check_number(self, name, integer=True, minimum=1, maximum=most)
        _check_number(self, "init_xavier_std", minimum=0)
        _check_number(self, "dropout", minimum=0, maximum=1)
        for name in ("deep_supervision", "attend_to_padding", "freeze_batch_norm", "freeze_backbone"):
            _check_choice(self, name, (True, False))
        if self.mask_kernel_size % 2 == 0:
            raise ValueError(f"{type(self).__name__}: mask_kernel_size={self.mask_kernel_size} must be odd.")
        if self.mask_upsampling > 1 and self.pixel_decoder != "per_pixel":
            raise ValueError(
                f"{type(self).__name__}: mask_upsampling={self.mask_upsampling} is for pixel_decoder='per_pixel' only."
            )
        if getattr(self, "architecture", "encoder_decoder") == "encoder_decoder":
            _check_divisible(self, "hidden_size", 2 * self.num_attention_heads)
        if self.pixel_decoder == "fpn_encoder":
            _check_divisible(self, "fpn_feature_size", 2 * self.num_attention_heads)
        _check_number(self, "num_labels", integer=True, minimum=1)


class MaskClsConfig(SegmentationNetworkConfig):
    """Configuration of mask classification: `MaskClsModel` and `MaskClsForUniversalSegmentation`.

    All fields of `SegmentationNetworkConfig`, and:

    Args:
        compatibility (`str`, defaults to `"exact"`): whose behavior the model has where implementations differ:
            `"exact"`, padding and void have no influence; or `"transformers"` or `"paper"`, what a checkpoint of
            transformers or of the papers' code was trained with, which is set where one is imported. What follows from
            it is a field of its own, `attend_to_padding`, and counts more where it is given. Given to `from_pretrained`
            it sets these anew.
        architecture (`str`, defaults to `"encoder_decoder"`): backbone, pixel decoder and transformer decoder; or
            `"encoder_only"`, a plain ViT that sees the queries in its last blocks (EoMT, Kerssies et al., CVPR 2025),
            whose `hidden_size` and `mask_feature_size` are those of the ViT.
        query_blocks (`int`, defaults to 4): blocks of the ViT that see the queries, with `"encoder_only"`.
        upscale_blocks (`int`, defaults to 2): each doubles the patches before masks are made of them.
        mask_probabilities (`list[float]`, *optional*): for each of the `query_blocks` the probability that a query sees
            the patches of its mask only; annealed from 1 to 0 in training. None: 0.
        masks_in_evaluation (`bool`, defaults to `True`): whether they hold in evaluation too, as in transformers and in
            EoMT's code during training; `False`: no masks there, whatever the probabilities.
        matching (`str`, defaults to `"bipartite"`):
            How predictions are assigned to ground-truth segments: `"bipartite"`, or `"fixed"` with query k for class
            k and `num_queries == num_labels` (paper Section 3.2); `"box"`, by predicted boxes as DETR, for which the
            model gets a box head and the loss `box_weight` and `giou_weight` (the paper's ablation of matching);
            `"pq"`, by the similarity of Max-DeepLab's PQ-style loss, class probability times Dice.
        cross_entropy_weight (`float`, defaults to 1.0): weight of the class loss, and of the class probability in
            the matching cost (Eq. 1).
        mask_weight (`float`, defaults to 20.0): lambda_focal of mask loss and matching cost (Section 4.1).
        mask_loss (`str`, defaults to `"focal"`): of the pixels of a mask, in loss and matching cost: `"focal"`, or
            `"cross_entropy"` (Mask2Former, with a `mask_weight` and a `dice_weight` of 5 and a `cross_entropy_weight`
            of 2).
        loss_points (`int`, *optional*): points at which masks are compared in matching and loss; Mask2Former has 12544.
            None: all pixels.
        loss_oversampling (`float`, defaults to 3.0): how many times as many points are drawn for the loss, of which the
            least sure are taken (PointRend).
        loss_importance (`float`, defaults to 0.75): share of the points that are taken so; the others are uniform.
        dice_weight (`float`, defaults to 1.0): lambda_dice of mask loss and matching cost (Section 4.1).
        no_object_weight (`float`, defaults to 0.1): weight of "no object" inside the class loss (Section 4.1).
        query_priors (`bool`, defaults to `False`): each query has learned class logits and a mask embedding of its own,
            to which what the network says of an image is added. A converted per-pixel model keeps its classifier there.
        output_auxiliary_logits (`bool`, defaults to `False`): return the pairs of the inner decoder layers too.
        box_weight (`float`, defaults to 5.0): weight of the L1 distance of boxes in loss and matching cost, with
            `matching="box"` (as DETR).
        giou_weight (`float`, defaults to 2.0): weight of 1 - GIoU in both (as DETR).
        pq_weight (`float`, defaults to 0.0): weight of the PQ-style loss of Max-DeepLab (Wang et al., CVPR 2021), whose
            code has 3. This one and the three below are off at 0. Max-DeepLab has them instead of the terms of Eq. 1,
            that is with `cross_entropy_weight`, `mask_weight` and `dice_weight` of 0.
        instance_discrimination_weight (`float`, defaults to 0.0): weight of the contrast of segments in the per-pixel
            embeddings (Max-DeepLab, auxiliary losses; its code has 1).
        mask_id_weight (`float`, defaults to 0.0): weight of the cross-entropy over the N masks at each pixel
            (Max-DeepLab, auxiliary losses; its code has 0.3).
        semantic_weight (`float`, defaults to 0.0): weight of the cross-entropy of a linear classifier on the per-pixel
            embeddings, a head that the model has above 0 only (Max-DeepLab, auxiliary losses; its code has 1).
        exclusive_masks (`bool`, defaults to `False`): the masks of an image share out each pixel, by a softmax over
            the queries (Max-DeepLab). Mask logits are then its log-odds, so that their sigmoid is the mask as ever.
        matching_options (`dict`, *optional*): further arguments of a matcher of somebody's own (`register_matcher`).
        losses (`dict`, *optional*): weights of further losses by their names (`register_loss`).
        loss_options (`dict`, *optional*): their further arguments, {name: {...}}.

    Examples:
        >>> from maskcls_hf import MaskClsConfig
        >>> config = MaskClsConfig(num_queries=50, id2label={0: "background", 1: "nucleus"})
        >>> config.num_labels, config.backbone_config.model_type
        (2, 'resnet')
    """

    model_type = "maskcls"
    auto_classes = {
        "AutoModel": "modeling_maskcls.MaskClsModel",
        "AutoModelForUniversalSegmentation": "modeling_maskcls.MaskClsForUniversalSegmentation",
        "AutoModelForInstanceSegmentation": "modeling_maskcls.MaskClsForUniversalSegmentation",
        "AutoModelForImageSegmentation": "modeling_maskcls.MaskClsForUniversalSegmentation",
    }

    compatibility: str = "exact"
    architecture: str = "encoder_decoder"
    query_blocks: int = 4
    upscale_blocks: int = 2
    mask_probabilities: Any = None
    masks_in_evaluation: bool = True
    matching: str = "bipartite"
    cross_entropy_weight: float | int = 1.0
    mask_weight: float | int = 20.0
    dice_weight: float | int = 1.0
    no_object_weight: float | int = 0.1
    mask_loss: str = "focal"
    loss_points: int | None = None
    loss_oversampling: float | int = 3.0
    loss_importance: float | int = 0.75
    query_priors: bool = False
    output_auxiliary_logits: bool = False
    box_weight: float | int = 5.0
    giou_weight: float | int = 2.0
    pq_weight: float | int = 0.0
    instance_discrimination_weight: float | int = 0.0
    mask_id_weight: float | int = 0.0
    semantic_weight: float | int = 0.0
    exclusive_masks: bool = False
    matching_options: Any = None
    losses: Any = None
    loss_options: Any = None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the configurations of other implementations too, where the package is installed."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        read = CONFIG_READERS.get(str(config_dict.get("model_type")), dict)
        return read(config_dict), kwargs

    def check_fields(self) -> None:
        """As of `SegmentationNetworkConfig`; fields of None get what follows from others."""
        _check_choice(self, "compatibility", COMPATIBILITIES)
        _check_choice(self, "architecture", ("encoder_decoder", "encoder_only"))
        for name in ("query_blocks", "upscale_blocks"):
            _check_number(self, name, integer=True, minimum=1, maximum=MOST_LAYERS)
        if self.mask_probabilities is None:
            self.mask_probabilities = [0.0] * self.query_blocks
        if not isinstance(self.mask_probabilities, list) or len(self.mask_probabilities) != self.query_blocks:
            raise ValueError(
                f"{type(self).__name__}: mask_probabilities={self.mask_probabilities!r} must be a list of "
                f"query_blocks={self.query_blocks} numbers."
            )
        for probability in self.mask_probabilities:
            _check_number_of("mask_probabilities", probability, type(self).__name__, minimum=0, maximum=1)
        if self.architecture == "encoder_only":
            self.hidden_size = self.mask_feature_size = getattr(self.backbone_config, "hidden_size", self.hidden_size)
        super().check_fields()
        _check_names(self, "matching")
        check_options(self, "matching_options", "losses", "loss_options")
        for name, weight in self.losses.items():
            _check_number_of(f"losses[{name!r}]", weight, type(self).__name__, minimum=0)
        if unused := sorted(set(self.loss_options) - set(self.losses)):
            raise ValueError(f"{type(self).__name__}: loss_options of {unused}, which losses does not have.")
        for name in WEIGHTS:
            _check_number(self, name, minimum=0)
        _check_choice(self, "mask_loss", ("focal", "cross_entropy"))
        if self.loss_points is not None:
            _check_number(self, "loss_points", integer=True, minimum=1)
        _check_number(self, "loss_oversampling", minimum=1)
        _check_number(self, "loss_importance", minimum=0, maximum=1)
        for name in ("masks_in_evaluation", "query_priors", "output_auxiliary_logits", "exclusive_masks"):
            _check_choice(self, name, (True, False))
        if self.matching == "fixed" and self.num_queries != self.num_labels:
            raise ValueError(
                f"{type(self).__name__}: matching='fixed' gives query k to class k, so num_queries={self.num_queries} "
                f"must equal num_labels={self.num_labels}."
            )
        matching_weights(self, self.matching)
        if self.mask_upsampling > 1 and (self.semantic_weight or self.instance_discrimination_weight):
            raise ValueError(
                f"{type(self).__name__}: semantic_weight and instance_discrimination_weight are for masks as large as "
                f"their embeddings, that is mask_upsampling=1, not {self.mask_upsampling}."
            )
        if self.exclusive_masks and self.num_queries < 2:
            raise ValueError(
                f"{type(self).__name__}: exclusive_masks=True shares out each pixel among the masks, so num_queries="
                f"{self.num_queries} must be at least 2."
            )


# Fields of transformers' MaskFormer that would make another network.
_BACKBONE = (
    "write {of}.from_backbone({backbone!r}, id2label=...) for that network, and from_backbone of the model's class for "
    "its pretrained weights too; or give backbone_config."
)
OF_MASKFORMER = {
    "backbone": _BACKBONE,
    "use_pretrained_backbone": _BACKBONE,
    "use_timm_backbone": _BACKBONE,
    "backbone_kwargs": _BACKBONE,
    "decoder_config": "its fields are num_queries, hidden_size, num_attention_heads, decoder_layers, decoder_ffn_dim "
    "and dropout, of this class. from_pretrained reads the configuration of transformers' MaskFormer.",
}


def _refuse_fields_of_maskformer(fields: dict[str, Any], of: str) -> None:
    """Raise `ValueError`, which says what to write instead; those that are off are taken out of `fields`."""
    backbone = fields.get("backbone") or "NAME"
    for field, why in OF_MASKFORMER.items():
        if fields.pop(field, None):
            raise ValueError(f"{of} has no {field}: {why.format(of=of, backbone=backbone)}")


PART_FIELDS = (
    "pixel_decoder_options", "transformer_decoder_options", "custom_parts", "matching_options", "losses",
    "loss_options",
)  # fmt: skip
# What transformers takes or keeps beside the fields of a configuration.
OF_TRANSFORMERS = (
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "num_hidden_layers",
    "num_labels", "output_attentions", "per_layer_config", "return_unused_kwargs", "tie_word_embeddings",
    "tokenizer_class", "torch_dtype", "torchscript", "use_cache",
)  # fmt: skip
OF_LOADING = ("cache_dir", "code_revision", "trust_remote_code")
WEIGHTS = (
    "cross_entropy_weight", "mask_weight", "dice_weight", "no_object_weight", "box_weight", "giou_weight", "pq_weight",
    "instance_discrimination_weight", "mask_id_weight", "semantic_weight",
)  # fmt: skip
MOST_LAYERS = 1000  # a file of a few bytes can ask for any number
LAYER_FIELDS = ("depths", "num_hidden_layers", "num_layers", "layer_depths", "stage_num_blocks", "stage_numb_of_layers")
POSITIVE_INTEGERS = (
    "num_queries", "hidden_size", "num_attention_heads", "encoder_layers", "encoder_ffn_dim", "decoder_layers",
    "decoder_ffn_dim", "fpn_feature_size", "mask_feature_size", "mask_kernel_size", "mask_upsampling",
)  # fmt: skip


def matching_weights(config: PreTrainedConfig, matching: str) -> dict[str, float]:
    """Weight of each term of the matching cost. Raises `ValueError` where all are 0: any match would do."""
    costs = MATCHING_COSTS.get(matching, {})
    weights = {term: getattr(config, name) for term, name in costs.items()}
    if costs and not any(weights.values()):
        raise ValueError(
            f"{type(config).__name__}: matching={matching!r} needs a weight above 0 among {', '.join(costs.values())}."
        )
    return weights


def as_backbone_config(backbone_config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """The configuration of a backbone, from a configuration, a dict with a `model_type`, or None (ResNet-50)."""
    if backbone_config is None:
        backbone_config = {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if isinstance(backbone_config, dict):
        fields = without_code(backbone_config)
        model_type = fields.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"backbone_config: model_type={model_type!r} is not a model type of transformers; "
                "give a backbone such as 'resnet', 'swin', 'convnext' or 'timm_backbone'."
            )
        _check_layers(fields)
        made = CONFIG_MAPPING[model_type](**fields)
        known = {field.name for field in dataclasses.fields(made)} | set(made.attribute_map)
        # Files of older versions have fields of which nothing is known any more.
        misspelt = [name for name in fields if similar(name, known) and not hasattr(type(made), name)]
        warn_about_unused(misspelt, known, f"backbone_config ({model_type})")
        return made
    if not hasattr(backbone_config, "model_type"):
        raise ValueError(f"backbone_config={backbone_config!r} must be a backbone configuration or its dict.")
    return backbone_config


def _check_layers(fields: Any) -> None:
    """Raise `ValueError` for a backbone of more layers than any has, however deep its configuration lies."""
    if isinstance(fields, list):
        for value in fields:
            _check_layers(value)
    elif isinstance(fields, dict):
        for name, value in fields.items():
            numbers = value if isinstance(value, list) else [value]
            counted = [number for number in numbers if isinstance(number, (int, float))]
            if name in LAYER_FIELDS and (len(numbers) > MOST_LAYERS or any(n > MOST_LAYERS for n in counted)):
                raise ValueError(f"backbone_config: {name}={reprlib.repr(value)} is more than {MOST_LAYERS} layers.")
            _check_layers(value)


def without_code(fields: Any) -> Any:
    """Fields of a saved configuration without what names code beside it, however deep: none of it is ever run."""
    if isinstance(fields, dict):
        return {name: without_code(value) for name, value in fields.items() if name != "auto_map"}
    return [without_code(value) for value in fields] if isinstance(fields, list) else fields


def checked_classes(id2label: Any) -> dict[int, str]:
    """Names of classes by their ids, 0 to K - 1 in this order. Ids as text become numbers, as JSON keeps them.

    Raises:
        `ValueError`: other ids, or none.

    Examples:
        >>> checked_classes({"1": "nucleus", "0": "background"})
        {0: 'background', 1: 'nucleus'}
    """
    try:
        names = {_as_integer(label): _as_name(name) for label, name in plain(dict(id2label)).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"id2label must be a dict of class ids 0, 1, ... and names, got {reprlib.repr(id2label)}."
        ) from error
    if sorted(names) != list(range(len(names))) or len(names) < max(1, len(id2label)):
        raise ValueError(f"id2label: ids must be 0..K-1 without gaps, got {shortened(sorted(names))}.")
    return {label: names[label] for label in range(len(names))}


def _as_integer(label: Any) -> int:
    """Of an integer, or its text."""
    if isinstance(label, str):
        return int(label)
    return operator.index(label)


def _as_name(name: Any) -> str:
    if name is None:
        raise TypeError("a class without a name")
    return str(name)


def shortened(ids: list[int], limit: int = 20) -> str:
    """Ids as text: the first `limit` of them, and how many more there are."""
    return str(ids) if len(ids) <= limit else f"{ids[:limit]} and {len(ids) - limit} more"


def _check_choice(config: PreTrainedConfig, name: str, choices: tuple[Any, ...]) -> None:
    value = getattr(config, name)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"{type(config).__name__}: {name}={value!r} must be one of {list(choices)}.")


def _check_names(config: PreTrainedConfig, *fields: str) -> None:
    for field in fields:
        if not isinstance(getattr(config, field), str):
            raise ValueError(f"{type(config).__name__}: {field}={getattr(config, field)!r} must be the name of a part.")


def check_options(config: PreTrainedConfig, *fields: str) -> None:
    """Raise `ValueError` unless the fields are dicts whose keys are text."""
    for field in fields:
        value = getattr(config, field)
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{type(config).__name__}: {field}={value!r} must be a dict by names.")


def check_references(custom_parts: dict[str, Any]) -> None:
    """Raise `ValueError` unless they are {kind: {name: "file.Class"}}: what they name is run, if it is trusted."""
    for kind, parts in custom_parts.items():
        for name, reference in parts.items() if isinstance(parts, dict) else [(kind, parts)]:
            if kind not in REGISTRIES or not re.fullmatch(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", str(reference), re.ASCII):
                raise ValueError(f"custom_parts: {kind}, {name}: {reference!r} must be file.Class of a part.")


def _check_number(
    config: PreTrainedConfig, name: str, minimum: float, maximum: float = float("inf"), integer: bool = False
) -> None:
    _check_number_of(name, getattr(config, name), type(config).__name__, minimum, maximum, integer)


def _check_number_of(
    name: str, value: Any, of: str, minimum: float, maximum: float = float("inf"), integer: bool = False
) -> None:
    kind = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not minimum <= value <= maximum or value == math.inf:
        limits = f"at least {minimum}" if maximum == float("inf") else f"from {minimum} to {maximum}"
        number = "an integer" if integer else "a number"
        raise ValueError(f"{of}: {name}={value!r} must be {number} {limits}.")


def _check_divisible(config: PreTrainedConfig, name: str, divisor: int) -> None:
    value = getattr(config, name)
    if value % divisor:
        raise ValueError(
            f"{type(config).__name__}: {name}={value} must be divisible by {divisor}, twice the number of attention "
            f"heads (num_attention_heads={config.num_attention_heads})."
        )


class PerPixelConfig(SegmentationNetworkConfig):
    """Configuration of `PerPixelForSemanticSegmentation` (paper Section 4.1, baselines).

    All fields of `SegmentationNetworkConfig`; the transformer's count only for PerPixelBaseline+, whose number of
    queries is the number of classes. And:

    Args:
        transformer_module (`bool`, defaults to `False`):
            `False`: PerPixelBaseline, a linear classifier on the per-pixel embeddings. `True`: PerPixelBaseline+,
            transformer module and mask embeddings added, one query a class, its mask the score of the class.
        semantic_loss_ignore_index (`int`, defaults to 255): label of pixels that the loss leaves out.

    Examples:
        >>> from maskcls_hf import PerPixelConfig
        >>> PerPixelConfig(transformer_module=True, id2label={0: "background", 1: "nucleus"}).num_labels
        2
    """

    model_type = "maskcls_perpixel"
    auto_classes = {"AutoModelForSemanticSegmentation": "modeling_maskcls.PerPixelForSemanticSegmentation"}

    transformer_module: bool = False
    semantic_loss_ignore_index: int = 255

    def check_fields(self) -> None:
        """As of `SegmentationNetworkConfig`, and there must be two classes or more."""
        super().check_fields()
        _check_choice(self, "transformer_module", (True, False))
        _check_number(self, "semantic_loss_ignore_index", integer=True, minimum=-100)
        check_several_classes(len(self.id2label or {}))


def check_several_classes(number: int) -> None:
    """Raise `ValueError` for one class: the cross-entropy over it is 0, and nothing would be learned."""
    if number < 2:
        raise ValueError("A per-pixel model with one class has nothing to tell apart: give it two, one of background.")
