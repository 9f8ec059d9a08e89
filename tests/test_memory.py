"""Freed memory goes back to the system."""

import numpy as np
import pytest

from checkpoints import image_processor, maskcls_model, picture
from maskcls_hf import MaskClsImageProcessor
from maskcls_hf.inference import Predictor
from maskcls_hf.models import image_processing_maskcls, post_processing

pytestmark = pytest.mark.skipif(post_processing._trim is None, reason="another C library than glibc")
MB = 1 << 20


def test_what_lies_between_blocks_in_use_is_given_back():
    post_processing.give_back_memory()
    before = post_processing._resident_bytes()
    blocks = [bytearray(100_000) for _ in range(4000)]  # below the size that glibc maps on its own
    kept = blocks[::40]
    del blocks
    assert post_processing._resident_bytes() > before + 300 * MB
    post_processing.give_back_memory()
    assert post_processing._resident_bytes() < before + 100 * MB and len(kept) == 100


def test_most_calls_only_read_a_number(monkeypatch):
    resident, trims = [500 * MB], []
    monkeypatch.setattr(post_processing, "_resident_bytes", lambda: resident[0])
    monkeypatch.setattr(post_processing, "_trim", trims.append)
    monkeypatch.setattr(post_processing, "_resident", 500 * MB)
    for now, expected in ((500, 0), (600, 0), (400, 0), (520, 0), (529, 1), (600, 1), (658, 2)):
        resident[0] = now * MB
        post_processing.give_back_memory()
        assert len(trims) == expected, now


def test_reading_images_and_making_maps_gives_back(monkeypatch):
    predict, calls = Predictor(maskcls_model(), image_processor()), []
    monkeypatch.setattr(image_processing_maskcls, "give_back_memory", lambda: calls.append("image"))
    monkeypatch.setattr(post_processing, "give_back_memory", lambda: calls.append("map"))
    predict(picture(), "semantic")
    assert calls == ["image", "map"]


@pytest.mark.slow
def test_images_of_mixed_sizes_leave_the_memory_flat():
    predict, random = Predictor(maskcls_model(), MaskClsImageProcessor(do_resize=False)), np.random.default_rng(0)
    resident = []
    for _ in range(300):
        low, high = (100, 300) if random.random() < 0.85 else (300, 1500)
        image = random.integers(0, 256, (*random.integers(low, high, 2), 3), dtype=np.uint8)
        predict(image, "panoptic")
        resident.append(post_processing._resident_bytes())
    assert max(resident[200:]) < max(resident[30:130]) + 100 * MB
