"""Checkpoints of the paper's code: every official architecture, and the outputs of its own code to equal."""

import collections
import pickle
from functools import cache

import numpy as np
import pytest
import torch
from conftest import needs_shared
from original_checkpoints import KEYS, empty, filled, keys
from torch.utils.flop_counter import FlopCounterMode

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor, PerPixelForSemanticSegmentation
from maskcls_hf.convert import from_original, save_from_original
from maskcls_hf.convert.checkpoint_files import read_checkpoint
from maskcls_hf.convert.original_names import parameters
from maskcls_hf.post_processing import panoptic_segments, per_pixel_map, semantic_map

TOLERANCE = 5e-5  # of the oracle: rounding in float32
VARIANTS = {
    "model_r50": "ade20k_r50",
    "model_panoptic_r50": "coco_panoptic_r50",
    "model_perpixelplus_r50": "ade20k_perpixelplus_r50",
}
MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
DEVIATION = torch.tensor([58.395, 57.12, 57.375])[:, None, None]


@cache
def official_model(case: str):
    return from_original(filled(VARIANTS[case]))


def network_input(images: list[np.ndarray], size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """uint8 images (3, h, w), normalised, then padded: a batch of `size`."""
    pixel_values = torch.zeros(len(images), 3, *size)
    pixel_mask = torch.zeros(len(images), *size, dtype=torch.int64)
    for index, image in enumerate(images):
        height, width = image.shape[1:]
        pixel_values[index, :, :height, :width] = (torch.from_numpy(image) - MEAN) / DEVIATION
        pixel_mask[index, :height, :width] = 1
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask}


def predictions(model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs by the names of the oracle."""
    if isinstance(model, PerPixelForSemanticSegmentation):
        base = model.model(**batch, output_hidden_states=True)
        layers = model.logits_of_layers(base, all_layers=True)
        return {"pred_masks": layers[-1], "aux0_pred_masks": layers[0], "aux4_pred_masks": layers[4]}
    outputs = model(**batch, output_auxiliary_logits=True)
    pairs = {"": outputs, "aux0_": outputs.auxiliary_logits[0], "aux4_": outputs.auxiliary_logits[4]}
    names = {"pred_logits": "class_queries_logits", "pred_masks": "masks_queries_logits"}
    return {prefix + key: pair[name] for prefix, pair in pairs.items() for key, name in names.items()}


def assert_close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=tolerance)


def assert_same_map(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal but for pixels on the border of two segments, where rounding decides."""
    assert (ours.numpy() == theirs).mean() > 0.999


needs_models = pytest.mark.parametrize("case_name", sorted(VARIANTS))


@needs_models
@torch.no_grad()
def test_equals_the_papers_code(oracle, case_name):
    case, model = oracle(case_name), official_model(case_name)
    batch = network_input([case["image_0"], case["image_1"]], tuple(case["network_input_size"]))

    ours = predictions(model, batch)
    for name, prediction in ours.items():
        assert_close(prediction, case[name])
    assert set(ours) == {name for name in case if name.removeprefix("aux0_").removeprefix("aux4_") in ours}

    feature_maps, features, _ = model.model.encode(**batch)
    for level, feature_map in enumerate(feature_maps):
        assert_close(feature_map[1], case[f"image_1_res{level + 2}"])
    assert_close(features.per_pixel_embeddings[1], case["image_1_mask_features"])
    if "image_1_transformer_encoder_features" in case:
        assert_close(features.context[1], case["image_1_transformer_encoder_features"])


@needs_models
@torch.no_grad()
def test_equals_the_papers_code_in_double_precision(oracle, case_name):
    """...to 1e-6, because its sine positions are float32 even then; the tolerance of float32 hides no mistake."""
    case = oracle(case_name)
    batch = network_input([case["image_0"], case["image_1"]], tuple(case["network_input_size"]))
    model = official_model(case_name).double()
    try:
        ours = predictions(model, batch | {"pixel_values": batch["pixel_values"].double()})
    finally:
        model.float()
    compared = [name for name in ours if f"image_1_{name}_f64" in case]
    for name in compared:
        assert_close(ours[name][1], case[f"image_1_{name}_f64"], 1e-6)
    assert "pred_masks" in compared
