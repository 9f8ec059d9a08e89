"""`pipeline("image-segmentation")` with the classes of the package."""

import logging

import numpy as np
import pytest
import torch
from transformers import pipeline

from checkpoints import CLASSES, STUFF, image_processor, maskcls_model, picture, save_maskcls, save_perpixel

HEIGHT, WIDTH = 48, 80
LABELS = {name: label for label, name in CLASSES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_maskcls(tmp_path_factory.mktemp("maskcls")))


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-segmentation", model=folder, device="cpu")


def outputs_of(model):
    with torch.no_grad():
        return model(**image_processor()(picture(HEIGHT, WIDTH), return_tensors="pt"))


def stack(segments: list[dict]) -> np.ndarray:
    return np.stack([np.asarray(segment["mask"]) > 0 for segment in segments])  # (n, H, W)


def test_semantic(pipe):
    segments = pipe(picture(HEIGHT, WIDTH), subtask="semantic")
    expected = image_processor().post_process_semantic_segmentation(outputs_of(pipe.model))[0].numpy()
    assert [segment["label"] for segment in segments] == [CLASSES[label] for label in np.unique(expected)]
    assert (stack(segments).sum(0) == 1).all()
    for segment, mask in zip(segments, stack(segments), strict=True):
        np.testing.assert_array_equal(mask, expected == LABELS[segment["label"]])


def test_panoptic_fuses_stuff(pipe):
    """Stuff comes as one segment a class: the processor's saved `label_ids_to_fuse` reaches the pipeline."""
    options = {"subtask": "panoptic", "threshold": 0.5, "overlap_mask_area_threshold": 0.0}
    labels = [segment["label"] for segment in pipe(picture(HEIGHT, WIDTH), **options)]
    assert all(labels.count(CLASSES[stuff]) == 1 for stuff in STUFF)

    pipe.image_processor.label_ids_to_fuse = None
    try:
        unfused = [segment["label"] for segment in pipe(picture(HEIGHT, WIDTH), **options)]
    finally:
        pipe.image_processor.label_ids_to_fuse = STUFF
    assert len(unfused) > len(labels)


def test_instances(pipe):
    segments = pipe(picture(HEIGHT, WIDTH), subtask="instance", threshold=0.9)
    result = image_processor().post_process_instance_segmentation(outputs_of(pipe.model), threshold=0.9)[0]
    assert [segment["score"] for segment in segments] == pytest.approx([s["score"] for s in result["segments_info"]])
    assert stack(segments).shape[1:] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("subtask", ["panoptic", "instance"])
def test_nothing_found(pipe, subtask):
    assert pipe(picture(HEIGHT, WIDTH), subtask=subtask, threshold=1.0, mask_threshold=1.0) == []


def test_several_images_of_different_sizes(pipe):
    images = [picture(HEIGHT, WIDTH), picture(64, 48)]
    results = pipe(images, subtask="semantic")
    assert [stack(segments).shape[1:] for segments in results] == [(HEIGHT, WIDTH), (64, 48)]


def test_model_and_processor_given(pipe):
    given = pipeline("image-segmentation", model=maskcls_model(), image_processor=image_processor(), device="cpu")
    expected = pipe(picture(HEIGHT, WIDTH), subtask="semantic")
    np.testing.assert_array_equal(stack(given(picture(HEIGHT, WIDTH), subtask="semantic")), stack(expected))


def test_per_pixel_baseline(tmp_path):
    pipe = pipeline("image-segmentation", model=str(save_perpixel(tmp_path)), device="cpu")
    segments = pipe(picture(HEIGHT, WIDTH), subtask="semantic")
    assert (stack(segments).sum(0) == 1).all()
    assert pipe(picture(HEIGHT, WIDTH)) == segments  # as with transformers' SegFormer
    with pytest.raises(ValueError, match="subtask='semantic'"):
        pipe(picture(HEIGHT, WIDTH), subtask="instance")


def test_nothing_is_complained_about(folder, caplog, monkeypatch):
    """No "model is not supported" in the log, and no question whether to trust the code in the folder."""
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(prompt))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pipeline("image-segmentation", model=folder, device="cpu")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
