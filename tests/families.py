"""Every family of models, tiny: what the tests of all of them are run on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, DINOv3ViTConfig

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor, PerPixelForSemanticSegmentation
from maskcls_hf.convert import from_per_pixel
from per_pixel_models import images, segformer, with_varied_scores
from tiny import (
    MAX_DEEPLAB,
    bottleneck_resnet,
    convnext,
    maskcls_config,
    pad_labels,
    perpixel_config,
    pixel_mask,
    segments,
    swin,
)

CLASSES = {0: "sky", 1: "road", 2: "car", 3: "person", 4: "dog", 5: "bicycle"}
STUFF = [0, 1]
PADDED = (64, 96)
SIZES = [(64, 96), (50, 70)]
MASK2FORMER = {
    "pixel_decoder": "deformable",
    "transformer_decoder": "masked_attention",
    "mask_kernel_size": 1,
    "mask_loss": "cross_entropy",
    "loss_points": 200,
    "cross_entropy_weight": 2.0,
    "mask_weight": 5.0,
    "dice_weight": 5.0,
}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
EOMT = {
    "architecture": "encoder_only",
    "query_blocks": 2,
    "upscale_blocks": 1,
    **{name: value for name, value in MASK2FORMER.items() if "loss" in name or "weight" in name},
}


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Args:
        make: fields of the configuration -> a model of random weights.
        fields: of its configuration.
        exempt: name of a test, why it does not apply.
        labels: what it learns from, "segments" or "pixels".
        one_size: why an exported network takes images of one size; None: of any.
        sees_padding: its network looks at padding, so that a result depends on the size of the batch.
        traced_sees_padding: it does where it is compiled or exported.
    """

    make: Callable[..., Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)
    labels: str = "segments"
    outputs: tuple[str, ...] = ("class_queries_logits", "masks_queries_logits")
    class_labels: tuple[int, ...] | None = None  # of the first image; None: random
    one_size: str | None = None
    sees_padding: bool = False
    traced_sees_padding: bool = False

    def model(self, **fields: Any) -> Any:
        torch.manual_seed(0)
        return self.make(**{"id2label": CLASSES, **self.fields, **fields})

    @property
    def finds_segments(self) -> bool:
        return self.labels == "segments"

    @property
    def tasks(self) -> dict[str, dict[str, float]]:
        """Options with which something is found."""
        options = {"panoptic": {"threshold": 0.5, "overlap_mask_area_threshold": 0.0}, "instance": {"threshold": 0.5}}
        return {"semantic": {}, **(options if self.finds_segments else {})}

    def processor(self, **options: Any) -> MaskClsImageProcessor:
        label_format = {"segments": "segments", "pixels": "semantic"}[self.labels]
        fields = {"size": {"shortest_edge": 64, "longest_edge": 128}, "label_ids_to_fuse": STUFF}
        return MaskClsImageProcessor(**{**fields, "label_format": label_format, **options})

    def batch(self, numbers: tuple[int, ...] = (3, 0)) -> dict[str, Any]:
        """Images of 64 x 96 and 50 x 70 in turn, with so many segments."""
        torch.manual_seed(1)
        sizes = [SIZES[place % 2] for place in range(len(numbers))]
        mask = pixel_mask(sizes, PADDED)
        inputs = {"pixel_values": torch.randn(len(sizes), 3, *PADDED) * mask[:, None], "pixel_mask": mask}
        masks, labels = segments(sizes, list(numbers))
        if self.labels == "pixels":
            maps = torch.full((len(sizes), *PADDED), 255)
            for of_image, stack, classes in zip(maps, pad_labels(masks, PADDED), labels, strict=True):
                for segment, label in zip(stack, classes, strict=True):
                    of_image[segment] = label
            return inputs | {"labels": maps}
        if self.class_labels is not None and numbers[0]:
            labels[0] = torch.tensor(self.class_labels[: numbers[0]])
        return inputs | {"mask_labels": pad_labels(masks, PADDED), "class_labels": labels}

    def inputs(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.batch().items() if name.startswith("pixel")}

    @torch.no_grad()
    def sure_model(self, image: Any) -> Any:
        """Queries differ in class and mask, and are sure of both: the model finds segments in `image`."""
        if not self.finds_segments:
            return self.model().eval()
        if self.make is converted:
            return self.model(source=with_varied_scores(segformer(), images("segformer"))).eval()
        model = self.model(num_queries=12).eval()
        for name, parameter in model.named_parameters():
            if "queries_embedder" in name or "queries_features" in name:
                parameter *= 30
        logits = model(**self.processor()(image, return_tensors="pt")).class_queries_logits
        module = model.segmentation_module
        module.class_predictor.weight *= 50
        module.class_predictor.bias += -50 * logits.mean((0, 1))
        module.mask_embedder.layers[-1].weight *= 50
        return model


def of_parts(**fields: Any) -> Any:
    return MaskClsForUniversalSegmentation(maskcls_config(**fields))


def per_pixel(**fields: Any) -> Any:
    return PerPixelForSemanticSegmentation(perpixel_config(**fields))


def converted(num_queries: int = 10, id2label: Any = None, source: Any = None, **fields: Any) -> Any:
    """A SegFormer, which has the names of the classes itself."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "decoder_layers": 2, "decoder_ffn_dim": 32}
    return from_per_pixel(source or segformer(), num_queries, **(sizes | fields))


SWIN_SIZE = "transformers' Swin decides in Python how to pad each stage to its windows"
FAMILIES = {
    "maskformer": Family(of_parts),
    "mask2former": Family(of_parts, MASK2FORMER),
    "eomt_dinov2": Family(of_parts, EOMT | {"backbone_config": Dinov2Config(**VIT)}, traced_sees_padding=True),
    "eomt_dinov3": Family(
        of_parts, EOMT | {"backbone_config": DINOv3ViTConfig(intermediate_size=48, **VIT)}, traced_sees_padding=True
    ),
    "converted": Family(converted, sees_padding=True),
    "baseline": Family(
        per_pixel,
        labels="pixels",
        outputs=("logits",),
        exempt={"test_gradient_checkpointing_changes_nothing": "a ResNet and an FPN have no layer to checkpoint"},
    ),
    "baseline_plus": Family(per_pixel, {"transformer_module": True}, labels="pixels", outputs=("logits",)),
}
# Further parts of the networks, for the tests that look at the network alone.
VARIANTS = {
    "maskformer_fpn_encoder": Family(of_parts, {"pixel_decoder": "fpn_encoder"}),
    "maskformer_bottleneck": Family(of_parts, {"backbone_config": bottleneck_resnet()}),
    "maskformer_convnext": Family(
        of_parts,
        {"backbone_config": convnext()},
        exempt={
            "test_trains_in_low_precision": "where an image is zero gradients of its layer norm overflow in float16"
        },
    ),
    "maskformer_swin": Family(of_parts, {"backbone_config": swin()}, one_size=SWIN_SIZE),
    "maskformer_fixed": Family(of_parts, {"matching": "fixed", "num_queries": 6}, class_labels=(0, 3, 4)),
    "maskformer_padding_seen": Family(of_parts, {"attend_to_padding": True}, sees_padding=True),
    "maskformer_box": Family(
        of_parts, {"matching": "box"}, outputs=("class_queries_logits", "masks_queries_logits", "pred_boxes")
    ),
    "maskformer_pq": Family(of_parts, {"matching": "pq"}),
    "max_deeplab": Family(of_parts, MAX_DEEPLAB),
    "eomt_masked": Family(of_parts, EOMT | {"backbone_config": Dinov2Config(**VIT), "mask_probabilities": [1.0, 1.0]}),
    "mask2former_swin": Family(of_parts, MASK2FORMER | {"backbone_config": swin()}, one_size=SWIN_SIZE),
}
