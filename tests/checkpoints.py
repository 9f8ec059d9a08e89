"""Folders of tiny random models, as `save_pretrained` writes them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor, PerPixelForSemanticSegmentation
from tiny import maskcls_config, perpixel_config

CLASSES = {0: "sky", 1: "road", 2: "car", 3: "person", 4: "dog"}
STUFF = [0, 1]


def image_processor() -> MaskClsImageProcessor:
    return MaskClsImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, label_ids_to_fuse=STUFF)


def maskcls_model() -> MaskClsForUniversalSegmentation:
    """A random model whose queries differ in class and mask, and are sure of both: it finds segments."""
    torch.manual_seed(0)
    model = MaskClsForUniversalSegmentation(maskcls_config(num_queries=12, id2label=CLASSES)).eval()
    with torch.no_grad():
        model.model.transformer_decoder.queries_embedder.weight *= 30
        logits = model(**image_processor()(picture(), return_tensors="pt")).class_queries_logits
        model.segmentation_module.class_predictor.weight *= 50
        model.segmentation_module.class_predictor.bias += -50 * logits.mean((0, 1))
        model.segmentation_module.mask_embedder.layers[-1].weight *= 50
    return model


def save_maskcls(folder: Path) -> Path:
    maskcls_model().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def save_perpixel(folder: Path) -> Path:
    torch.manual_seed(0)
    PerPixelForSemanticSegmentation(perpixel_config(id2label=CLASSES)).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def picture(height: int = 48, width: int = 80) -> Image.Image:
    """Colored blobs."""
    colors = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
