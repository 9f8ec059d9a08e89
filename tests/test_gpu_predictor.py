"""What a CUDA device computes, beside the CPU; run with `pytest -m gpu`."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from checkpoints import image_processor, maskcls_model, picture
from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.inference import Predictor
from tiny import bottleneck_resnet, convnext, maskcls_config, swin

pytestmark = pytest.mark.gpu
NUCLEI = "model_cards/maskcls-nuclei-tiny"
TASKS = {
    "semantic": {},
    "panoptic": {"threshold": 0.5, "overlap_mask_area_threshold": 0.0},
    "instance": {"threshold": 0.5},
}
BACKBONES = {"ResNet": bottleneck_resnet, "Swin": swin, "ConvNeXt": convnext}


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """Products in float32, as on the CPU."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def share(found: dict, expected: dict) -> float:
    """Of pixels with the same segment."""
    assert found["segmentation"].device.type == "cpu"
    return (found["segmentation"] == expected["segmentation"]).double().mean().item()


@pytest.fixture(scope="module")
def model() -> MaskClsForUniversalSegmentation:
    return maskcls_model()


class TestPredictor:
    def on_gpu(self, model, **options) -> Predictor:
        return Predictor(copy.deepcopy(model), image_processor(), device="cuda", **options)

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("options", [{}, {"tile": 48}, {"enlarge": 2.0}])
    def test_maps_are_those_of_the_cpu(self, model, task, options):
        predict = self.on_gpu(model, **options)
        assert predict.model.device.type == "cuda"
        for size in ((48, 80), (100, 60)):
            expected = Predictor(model, image_processor(), **options)(picture(*size), task, **TASKS[task])
            found = predict(picture(*size), task, **TASKS[task])
            assert share(found, expected) > 0.99  # the weights of this model make differences 50 times as large
            assert [i["label_id"] for i in found["segments_info"]] == [i["label_id"] for i in expected["segments_info"]]

    def test_a_trained_model(self):
        predict = Predictor.from_pretrained(NUCLEI, "cuda")
        expected = Predictor.from_pretrained(NUCLEI)
        image = np.asarray(picture(160, 240))
        for task, options in TASKS.items():
            assert share(predict(image, task, **options), expected(image, task, **options)) > 0.999

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, model, dtype):
        predict = self.on_gpu(model, dtype=dtype)
        for size in ((48, 80), (100, 60)):
            expected = Predictor(model, image_processor())(picture(*size), "semantic")
            assert share(predict(picture(*size), "semantic"), expected) > 0.95
        assert next(predict.model.parameters()).dtype == torch.float32
        inputs = image_processor()(picture(), return_tensors="pt")
        logits = predict.outputs(inputs).masks_queries_logits
        assert logits.dtype == getattr(torch, dtype) and bool(logits.isfinite().all())

    def test_batches_of_one_size_and_of_several(self, model):
        sizes = [(48, 80), (64, 64), (48, 80), (64, 64), (48, 80), (96, 64)]
        images = [picture(*size) for size in sizes]
        expected = Predictor(model, image_processor(), batch_size=1)(images, "semantic")
        for batch_size in (None, 2, 3):
            found = self.on_gpu(model, batch_size=batch_size)(images, "semantic")
            for one, other, size in zip(found, expected, sizes, strict=True):
                assert one["segmentation"].shape == size and share(one, other) > 0.999
        assert self.on_gpu(model).batch_size > 1 == Predictor(model, image_processor()).batch_size

    def test_compiled(self, model):
        predict, plain = self.on_gpu(model, compile=True), self.on_gpu(model)
        for size in ((48, 80), (64, 64), (100, 60), (48, 80)):
            found, expected = (p(picture(*size), "semantic") for p in (predict, plain))
            assert share(found, expected) > 0.999
        assert predict.network.compiled is not None

    @pytest.mark.parametrize("backbone", BACKBONES)
    @pytest.mark.parametrize("decoder", ["fpn", "fpn_encoder"])
    @pytest.mark.parametrize("attend_to_padding", [False, True])
    @pytest.mark.parametrize("with_mask", [False, True])
    def test_the_host_does_not_wait_in_forward(self, backbone, decoder, attend_to_padding, with_mask):
        config = maskcls_config(
            backbone_config=BACKBONES[backbone](), pixel_decoder=decoder, attend_to_padding=attend_to_padding
        )
        model = MaskClsForUniversalSegmentation(config).eval().cuda()
        pixel_values = torch.randn(2, 3, 64, 96, device="cuda")
        pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64, device="cuda")
        pixel_mask[0, 40:] = 0
        inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask if with_mask else None}
        with torch.no_grad():
            model(**inputs)  # what libraries set up once
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                outputs = model(**inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert outputs.valid_sizes.tolist() == ([[40, 96], [64, 96]] if with_mask else [[64, 96]] * 2)

    def test_padding_is_kept_out_as_on_the_cpu(self):
        model = MaskClsForUniversalSegmentation(maskcls_config(backbone_config=swin())).eval()
        pixel_values, pixel_mask = torch.randn(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.int64)
        pixel_mask[0, 40:] = 0
        pixel_mask[1, :, 70:] = 0
        pixel_values *= pixel_mask[:, None]
        with torch.no_grad():
            expected = model(pixel_values, pixel_mask=pixel_mask)
            found = model.cuda()(pixel_values.cuda(), pixel_mask=pixel_mask.cuda())
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(found[name].cpu(), expected[name], atol=1e-4, rtol=1e-4)

    def test_memory_is_no_more_than_a_few_maps(self):
        """A photograph of 1080p through a network of 100 queries: not its masks at full size."""
        config = maskcls_config(backbone_config=bottleneck_resnet(), num_queries=100, num_labels=20)
        predict = self.on_gpu(MaskClsForUniversalSegmentation(config).eval())
        image = np.asarray(picture(1080, 1920))
        predict(image, "panoptic", threshold=0.0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        predict(image, "panoptic", threshold=0.0)
        assert torch.cuda.max_memory_allocated() - before < 0.5e9
