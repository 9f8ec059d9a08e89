"""Any per-pixel model -> mask classification (paper Sections 3.1 and 3.2), with the same semantic map to start from."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
)
from transformers.utils import logging

from ..inference.loading import load_model, saved_config, where_to_look
from ..models.configuration_maskcls import MaskClsConfig, PerPixelConfig, SegmentationNetworkConfig, without_code
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.modeling_maskcls import MaskClsForUniversalSegmentation
from ..models.per_pixel_networks import PER_PIXEL_NETWORKS, PerPixelNetwork, classifier_of
from ..utils.quiet import quiet

logger = logging.get_logger(__name__)

CLASS_PROBABILITY = 0.9  # of the class that a query starts with; above all panoptic thresholds, the paper's 0.8 too
EMPTY_MASK_PROBABILITY = 0.01  # of the other queries' masks; the usual start of a focal loss (RetinaNet, Section 4.1)
PROCESSOR_OPTIONS = (
    "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
    "do_flip_channel_order", "do_reduce_labels",
)  # fmt: skip


def from_per_pixel(
    model_or_path: nn.Module | str | Path,
    num_queries: int | None = None,
    matching: str | None = None,
    config: PreTrainedConfig | None = None,
    **fields: Any,
) -> MaskClsForUniversalSegmentation:
    """Mask classification with the network of a per-pixel model, and before any training with its semantic map.

    Backbone, decoder, classes and the classifier are kept: query k starts with class k and with row k of the
    classifier as its mask embedding, whatever the image. Its mask logits are then the scores of class k (less the mean
    over all classes, which changes no argmax), and as all queries are equally sure of their class, the class of a pixel
    is the one with the greatest score. The remaining queries start with "no object" and an empty mask. The transformer
    decoder is new; what it says is added to that start and is zero at first.

    The maps are the same at the size of the network's input. Where they are then resized to that of the image, sums of
    probabilities are, not scores, which moves a border by a pixel here and there. Of PerPixelBaseline+, which keeps its
    transformer, they are the same with one query a class; more change them, because its queries attend to each other.

    Args:
        model_or_path (`nn.Module` or `str` or `Path`):
            A SegFormer, UPerNet, DPT, BEiT, Data2Vec, MobileViT (v1, v2) or MobileNetV2 of transformers, or one of our
            baselines, as model, folder or name on the Hub; or a model with an adapter, see
            `maskcls_hf.models.per_pixel_networks.register_per_pixel_network`.
        num_queries (`int`, *optional*): N, at least K; None: K.
        matching (`str`, *optional*): `"fixed"` (N = K) or another of `MaskClsConfig`; None: fixed if N = K, else
            bipartite.
        config (`PreTrainedConfig`, *optional*): of a model that does not carry one.
        fields: others of `MaskClsConfig`, such as `decoder_layers`.

    Raises:
        `ValueError`: the model cannot be converted; lists what is missing.
    """
    source: Any = load(model_or_path) if isinstance(model_or_path, (str, Path)) else model_or_path
    given: Any = config or getattr(source, "config", None)
    if given is None or not hasattr(given, "model_type"):
        raise ValueError(
            f"{type(source).__name__} has no configuration with a model_type. Give config=..., of a class for which "
            "register_per_pixel_network named an adapter."
        )
    label2id = {name: label for label, name in given.id2label.items()}
    fields |= {"query_priors": True, "id2label": dict(given.id2label), "label2id": label2id}
    fields["num_queries"] = given.num_labels if num_queries is None else num_queries
    if fields["num_queries"] < given.num_labels:
        raise ValueError(f"num_queries={num_queries} must be at least the number of classes, {given.num_labels}.")
    if given.num_labels < 2:
        raise ValueError("A model with one class has no classes to tell apart: train it with two, one of background.")
    fields["matching"] = matching or ("fixed" if fields["num_queries"] == given.num_labels else "bipartite")
    convert = _from_baseline if given.model_type == PerPixelConfig.model_type else _from_network
    weight = next(source.parameters())
    converted: MaskClsForUniversalSegmentation = convert(source, given, fields).to(weight.device, weight.dtype)
    converted.train(source.training)
    return converted


def load(path: str | Path) -> Any:
    """The per-pixel model at `path`, a folder or a name on the Hub."""
    fields = saved_config(path)
    model_type = fields["model_type"]
    if model_type == PerPixelConfig.model_type:
        return load_model(path)
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        raise ValueError(
            f"{path} holds a {model_type}, which is no semantic segmentation model of transformers. Convertible are "
            f"{sorted(PER_PIXEL_NETWORKS)} and our baselines; give others as a model, with an adapter."
        )
    # The configuration without code that a checkpoint names for itself or its backbone: transformers would offer to
    # run it.
    config = CONFIG_MAPPING[model_type].from_dict(without_code(fields))
    return load_model(path, AutoModelForSemanticSegmentation, config=config, trust_remote_code=False)


# -- a network of another library -------------------------------------------------------------------------------------


@torch.no_grad()
def _from_network(source: Any, config: PreTrainedConfig, fields: dict[str, Any]) -> MaskClsForUniversalSegmentation:
    """A per-pixel network that has an adapter."""
    adapter = PER_PIXEL_NETWORKS.get(config.model_type)
    if adapter is None:
        raise ValueError(
            f"{type(source).__name__} (model_type={config.model_type!r}) cannot be converted. Missing:\n- an adapter: "
            "a PerPixelNetwork that says where its classifier, per-pixel embeddings and context are, made known by "
            f"register_per_pixel_network. There are adapters for {sorted(PER_PIXEL_NETWORKS)}."
        )
    classifier = classifier_of(adapter, source)
    if classifier.out_channels != config.num_labels:
        raise ValueError(
            f"The classifier has {classifier.out_channels} outputs, its config {config.num_labels} classes."
        )
    kernel_size, channels = classifier.kernel_size[0], classifier.in_channels
    network_config = copy.deepcopy(config)
    network_config.num_labels = 2  # the names of the classes are the new model's
    model = MaskClsForUniversalSegmentation(
        MaskClsConfig(
            backbone_config=network_config,
            pixel_decoder="per_pixel",
            mask_kernel_size=kernel_size,
            mask_feature_size=channels * kernel_size**2 + 1,
            mask_upsampling=_upsampling_of(adapter, source),
            **fields,
        )
    )
    _load_network(model.model.backbone, source)
    # The per-pixel embeddings are what the classifier sees at a pixel, and a one for its bias.
    projection = model.model.pixel_decoder.mask_projection
    seen = torch.eye(channels * kernel_size**2).view(-1, channels, kernel_size, kernel_size)
    projection.weight.copy_(torch.cat([seen, torch.zeros_like(seen[:1])]))
    projection.bias.zero_()[-1] = 1
    _start_queries(model, classifier.weight, classifier.bias)
    return model


def _upsampling_of(adapter: type[PerPixelNetwork], source: nn.Module) -> int:
    """By what factor the model upsamples the scores of its classifier before it returns them.

    Raises:
        `ValueError`: not bilinearly, by a whole factor and with aligned corners.
    """
    if adapter.upsampling is None:
        return 1
    layer: Any = source.get_submodule(adapter.upsampling)
    if isinstance(layer, nn.Identity):
        return 1
    factor = getattr(layer, "scale_factor", None)
    known = isinstance(layer, nn.Upsample) and layer.mode == "bilinear" and layer.align_corners
    if not known or not isinstance(factor, (int, float)) or factor != int(factor):
        raise ValueError(
            f"{type(source).__name__} upsamples its scores by {layer}: a bilinear nn.Upsample by a whole factor and "
            "with align_corners=True can be converted."
        )
    return int(factor)


def _load_network(adapter: PerPixelNetwork, source: nn.Module) -> None:
    """Copy the weights of a per-pixel model into the adapter's network, which lacks its heads."""
    left_out = tuple(f"{path}." for path in adapter.left_out)
    result = adapter.network.load_state_dict(source.state_dict(), strict=False)
    extra = [name for name in result.unexpected_keys if not name.startswith(left_out)]
    wrong = [*result.missing_keys, *extra]
    if wrong:
        raise ValueError(
            f"{type(source).__name__} and the network that {type(adapter).__name__} builds from its config differ in "
            f"{len(wrong)} weights, such as {wrong[0]}: the config does not describe this model."
        )


# -- our baselines ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _from_baseline(source: Any, config: PreTrainedConfig, fields: dict[str, Any]) -> MaskClsForUniversalSegmentation:
    """PerPixelBaseline, or PerPixelBaseline+, whose transformer and mask embeddings are kept too."""
    shared = {name: copy.deepcopy(getattr(config, name)) for name in SegmentationNetworkConfig.__annotations__}
    has_transformer = config.transformer_module
    shared["mask_feature_size"] += 0 if has_transformer else 1
    model = MaskClsForUniversalSegmentation(MaskClsConfig(**(shared | fields)))
    state = {name: value.cpu() for name, value in source.state_dict().items()}
    if has_transformer:
        name = "model.transformer_decoder.queries_embedder.weight"
        rest = model.model.transformer_decoder.queries_embedder.weight[config.num_labels :]
        state[name] = torch.cat([state[name], rest.to(state[name].dtype)])
        model.segmentation_module.mask_embedder.load_state_dict(source.mask_embedder.state_dict())
        state = {key: value for key, value in state.items() if not key.startswith("mask_embedder.")}
        _start_queries(model)
    else:
        name = "model.pixel_decoder.mask_projection"  # one more embedding, of ones, for the classifier's bias
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        state[f"{name}.weight"] = torch.cat([weight, torch.zeros_like(weight[:1])])
        state[f"{name}.bias"] = torch.cat([bias, torch.ones_like(bias[:1])])
        _start_queries(model, state.pop("classifier.weight"), state.pop("classifier.bias"))
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    return model


# -- the start of the queries -----------------------------------------------------------------------------------------


def _start_queries(
    model: MaskClsForUniversalSegmentation, weight: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """Query k: class k, and as mask row k of a classifier, weight (K, ...) and bias (K,); None: masks of its own.

    The other queries: no object, and where there is a classifier an empty mask.
    """
    module, num_labels = model.segmentation_module, model.config.num_labels
    module.class_predictor.weight.zero_()
    module.class_predictor.bias.zero_()
    # Softmax over K + 1 logits, all others zero.
    certain = math.log(CLASS_PROBABILITY / (1 - CLASS_PROBABILITY) * num_labels)
    for query, logits in enumerate(module.class_priors.weight):
        logits[min(query, num_labels)] = certain
    if weight is None:
        return
    last: Any = module.mask_embedder.layers[-1]
    last.weight.zero_()
    last.bias.zero_()
    rows = weight.flatten(1).cpu()
    biases = torch.zeros_like(rows[:, 0]) if bias is None else bias.cpu()
    embeddings = torch.cat([rows, biases[:, None]], dim=1)
    module.mask_priors.weight[:num_labels] = embeddings - embeddings.mean(0)  # sigmoids saturate less
    module.mask_priors.weight[num_labels:, -1] = math.log(EMPTY_MASK_PROBABILITY / (1 - EMPTY_MASK_PROBABILITY))


# -- image processors -------------------------------------------------------------------------------------------------


def processor_from_per_pixel(processor: Any, **options: Any) -> MaskClsImageProcessor:
    """Our image processor with the options of a per-pixel model's, transformers' or ours.

    Images are never cropped: of a processor that cuts out the center, only the resizing is kept. What it does
    otherwise and ours cannot is logged as a warning.

    Args:
        processor: an image processor, or the folder or Hub name of one.
        options: others of `MaskClsImageProcessor`, such as `size_divisor`.
    """
    if isinstance(processor, (str, Path)):
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                processor, trust_remote_code=False, **where_to_look(processor)
            )
    theirs = processor.to_dict()
    if theirs["image_processor_type"] == MaskClsImageProcessor.__name__:
        ours: MaskClsImageProcessor = MaskClsImageProcessor.from_dict(theirs | {"label_format": "segments"} | options)
        return ours
    kept = {name: theirs[name] for name in PROCESSOR_OPTIONS if theirs.get(name) is not None}
    kept.setdefault("do_normalize", False)
    if theirs.get("keep_aspect_ratio") and set(kept.get("size", {})) == {"height", "width"}:
        logger.warning(
            f"keep_aspect_ratio with size={kept['size']}: here the shortest edge becomes {min(kept['size'].values())}; "
            "sizes can differ."
        )
        kept["size"] = {"shortest_edge": min(kept["size"].values())}
    if theirs.get("do_center_crop"):
        logger.warning("do_center_crop: left out, so that maps cover the whole image.")
    return MaskClsImageProcessor(**(kept | options))


def save_from_per_pixel(
    path: str | Path, out: str | Path, num_queries: int | None = None, matching: str | None = None
) -> None:
    """Convert the per-pixel model at `path`, a folder or a name on the Hub, and its image processor if there is one.

    Args:
        path: of a checkpoint of transformers, or of one of our baselines.
        out: the folder, which is made.
        num_queries: as of `from_per_pixel`.
        matching: as of `from_per_pixel`.

    Raises:
        `ValueError`: as `from_per_pixel`.
    """
    model = from_per_pixel(path, num_queries, matching)
    try:
        processor = processor_from_per_pixel(path)
    except OSError:
        logger.warning(f"{path} has no image processor, and so the converted model gets none.")
    else:
        processor.save_pretrained(out)
    model.save_pretrained(out)
