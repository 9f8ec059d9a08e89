"""What runs on a GPU equals what runs on a CPU: `pytest -m gpu`."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from maskcls_hf import MaskClsCriterion, MaskClsForUniversalSegmentation
from maskcls_hf.models import device_maps, fused_losses, matching, post_processing
from maskcls_hf.models.post_processing import (
    PlainMaps,
    ResizeGeometry,
    instance_segments,
    panoptic_segments,
    per_pixel_map,
    semantic_map,
)
from maskcls_hf.models.transformer_decoders import PixelLogits, SegmentLogits
from test_losses import VARIANTS, as_map, leaf_layers, leaf_pixels, part, tensors
from tiny import maskcls_config, pixel_mask, segments

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_cuda(layers: list[SegmentLogits], pixels: PixelLogits) -> tuple[list[SegmentLogits], PixelLogits]:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().cuda().requires_grad_()

    return [layer.map(leaf) for layer in layers], PixelLogits(*map(leaf, pixels))


class TestCriterion:
    @pytest.mark.parametrize("variant", ["fixed", *VARIANTS])
    @pytest.mark.parametrize("form", ["stacks", "maps"])
    @pytest.mark.parametrize("with_padding", [False, True])
    @pytest.mark.parametrize("chunk", ["one", "many"])
    @pytest.mark.parametrize("is_fused", [True, False])
    def test_loss_and_gradients_equal_the_cpus(self, variant, form, with_padding, chunk, is_fused, monkeypatch):
        monkeypatch.setattr(fused_losses, "_works", is_fused)
        if chunk == "many":
            monkeypatch.setattr(matching, "DEVICE_CHUNK", 40_000)
        sizes, padded = [(64, 96), (40, 60), (64, 96)], (64, 96)
        masks, labels = segments(sizes, [3, 2, 0])
        labels = [torch.randperm(5)[: len(own)] for own in labels]
        given = masks if form == "stacks" else [as_map(own) for own in masks]
        valid_mask = pixel_mask(sizes, padded) if with_padding else None
        if valid_mask is not None:
            valid_mask[0, 5:9, 5:20] = 0  # void
        config = maskcls_config(num_queries=5, **VARIANTS.get(variant, {"matching": variant}))
        layers, pixels = leaf_layers(3, queries=5, variant=variant), leaf_pixels(3)
        results = []
        for device in ("cpu", "cuda"):
            own = part(layers, pixels, slice(None)) if device == "cpu" else on_cuda(layers, pixels)
            on_device = [[tensor.to(device) for tensor in of_images] for of_images in (given, labels)]
            criterion = MaskClsCriterion(config)
            mask = None if valid_mask is None else valid_mask.to(device)
            terms = criterion(own[0], *on_device, mask, pixels=own[1], image_sizes=torch.tensor(sizes, device=device))
            criterion.total(terms).backward()
            gradients = [tensor.grad.cpu() for tensor in tensors(*own) if tensor.grad is not None]
            results.append([*(term.detach().cpu() for term in terms.values()), *gradients])
        assert fused_losses._works == is_fused, "the kernels ran"
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_logits_are_computed_with_in_float32(self, dtype):
        masks, labels = segments([(64, 96)] * 2, [3, 2])
        layers = [layer.map(lambda tensor: tensor.detach().to(dtype)) for layer in leaf_layers(2)]
        criterion = MaskClsCriterion(maskcls_config())
        results = []
        for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
            own = [layer.map(lambda t, d=device, k=kind: t.to(d, k).requires_grad_()) for layer in layers]
            with torch.autocast(device, torch.bfloat16):
                terms = criterion(own, [m.to(device) for m in masks], [c.to(device) for c in labels])
            assert all(term.dtype == torch.float32 for term in terms.values())
            criterion.total(terms).backward()
            assert all(layer.mask_logits.grad.dtype == kind for layer in own)
            results.append([*(term.detach().cpu() for term in terms.values()), *(x.mask_logits.grad for x in own)])
        for expected, found in zip(*results, strict=True):
            tolerance = {"atol": 1e-6, "rtol": 1e-4} if found.dtype == torch.float32 else {"atol": 1e-6, "rtol": 1e-2}
            torch.testing.assert_close(found.cpu().float(), expected.cpu(), **tolerance)

    def test_the_host_waits_once(self):
        """For the costs; any other wait raises in this mode of CUDA's."""
        masks, labels = segments([(64, 96)] * 2, [3, 2])
        masks, labels = [own.cuda() for own in masks], [own.cuda() for own in labels]
        layers, _ = on_cuda(leaf_layers(2), leaf_pixels(2))
        criterion = MaskClsCriterion(maskcls_config())
        valid_mask = torch.ones(2, 64, 96, device="cuda")
        criterion.total(criterion(layers, masks, labels, valid_mask)).backward()
        matcher, cpu = criterion.matcher, Tensor.cpu

        def transfer(tensor: Tensor) -> Tensor:
            torch.cuda.set_sync_debug_mode("default")
            on_host = cpu(tensor)
            torch.cuda.set_sync_debug_mode("error")
            return on_host

        def match(*args):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tensor, "cpu", transfer)
                return matcher(*args)

        criterion.matcher = match
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion.total(criterion(layers, masks, labels, valid_mask)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestTrainingStep:
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
    def test_a_step_equals_the_cpus(self, dtype):
        """In float32, in bfloat16, and in float16 with scaled gradients."""
        torch.manual_seed(0)
        reference = MaskClsForUniversalSegmentation(maskcls_config()).train()
        images = torch.randn(2, 3, 64, 96)
        masks, labels = segments([(64, 96), (40, 60)], [3, 2])
        inside = pixel_mask([(64, 96), (40, 60)], (64, 96))
        images *= inside[:, None]
        results = []
        for device in ("cpu", "cuda"):
            model = MaskClsForUniversalSegmentation(maskcls_config()).train().to(device)
            model.load_state_dict(reference.state_dict())
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            scaler = torch.amp.GradScaler(device, enabled=device == "cuda" and dtype == torch.float16)
            inputs = images.to(device), [m.to(device) for m in masks], [c.to(device) for c in labels], inside.to(device)
            with torch.autocast(device, dtype, enabled=device == "cuda" and dtype is not None):
                loss = model(*inputs).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            before = next(model.parameters()).detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert norm.isfinite() and not torch.equal(before, next(model.parameters()))
            results.append((loss.item(), norm.item()))
        (loss, norm), (expected_loss, expected_norm) = results[1], results[0]
        assert loss == pytest.approx(expected_loss, rel=1e-3 if dtype is None else 0.1)
        assert norm == pytest.approx(expected_norm, rel=1e-2 if dtype is None else 0.3)


class TestMaps:
    """On CUDA, with and without the Triton kernel, beside the plain order on the same device."""

    SIZES = [
        dict(padded_size=(512, 928), valid_size=(512, 910), target_size=(1080, 1920)),
        dict(padded_size=(512, 928), valid_size=(500, 928), target_size=(500, 928)),
        dict(padded_size=(256, 464), valid_size=(200, 464), target_size=(97, 301)),
        dict(padded_size=(128, 232), valid_size=(128, 232), target_size=(128, 232)),
        dict(padded_size=(64, 100), valid_size=(61, 99), target_size=(1, 700)),
    ]
    CASES = list(zip(SIZES, [torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32], strict=True))

    @pytest.fixture(params=["kernels", "chunks"])
    def way(self, request):
        if request.param == "kernels":
            pytest.importorskip("triton")
            yield
        else:
            with (
                mock.patch.object(device_maps, "kernels_work", lambda *_: False),
                mock.patch.object(device_maps, "CHUNK_BYTES", 2**26),
            ):
                yield

    @staticmethod
    def pair(dtype: torch.dtype, queries: int = 100, labels: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
        """Smooth masks with noise, of queries that are more or less sure."""
        generator = torch.Generator().manual_seed(0)
        class_logits = 4 * torch.randn(queries, labels + 1, generator=generator)
        coarse = 12 * torch.randn(queries, 1, 12, 20, generator=generator) - 6
        mask_logits = torch.nn.functional.interpolate(coarse, (128, 232), mode="bicubic")[:, 0]
        mask_logits += 0.5 * torch.randn(mask_logits.shape, generator=generator)
        return class_logits.to("cuda", dtype), mask_logits.to("cuda", dtype)

    @staticmethod
    def plain(mask_logits: torch.Tensor, sizes: dict) -> PlainMaps:
        return PlainMaps(ResizeGeometry.checked(mask_logits, **sizes))

    @staticmethod
    def plain_maps_of(logits: torch.Tensor, *sizes: tuple[int, int]) -> PlainMaps:
        return PlainMaps(ResizeGeometry.checked(logits, *sizes))

    @staticmethod
    def assert_greatest(result: torch.Tensor, values: torch.Tensor) -> None:
        greatest, chosen = values.amax(0), values.gather(0, result[None])[0]
        assert ((greatest - chosen) / greatest.abs().clamp(min=1)).max() <= 1e-5
        assert (result == values.argmax(0)).float().mean() > 0.999

    @pytest.mark.parametrize(("compare", "sums"), device_maps.WAYS)
    def test_the_kernels_work(self, compare, sums):
        pytest.importorskip("triton")
        device = torch.zeros(1, device="cuda").device
        device_maps.check_kernels(device, compare, sums)
        assert device_maps.kernels_work(device, compare, sums)

    @pytest.mark.parametrize(("sizes", "dtype"), CASES)
    @pytest.mark.parametrize("resize", ["scores", "logits"])
    def test_semantic_equals_the_plain_order(self, way, sizes, resize, dtype):
        class_logits, mask_logits = self.pair(dtype)
        with torch.autocast("cuda", torch.bfloat16):
            result = semantic_map(class_logits, mask_logits, **sizes, resize=resize)
        class_probs = class_logits.float().softmax(-1)[:, :-1]
        self.assert_greatest(
            result, self.plain(mask_logits, sizes).semantic_scores(class_probs, mask_logits.float(), resize)
        )
        assert result.is_cuda and result.dtype == torch.int64

    def test_semantic_where_tf32_is_allowed(self):
        class_logits, mask_logits = self.pair(torch.float32)
        class_probs, sizes = class_logits.softmax(-1)[:, :-1], self.SIZES[0]
        expected = self.plain(mask_logits, sizes).semantic_scores(class_probs, mask_logits, "scores")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            result = semantic_map(class_logits, mask_logits, **sizes)
        finally:
            torch.set_float32_matmul_precision(before)
        self.assert_greatest(result, expected)

    @pytest.mark.parametrize("sizes", SIZES)
    def test_per_pixel_equals_the_plain_order(self, way, sizes):
        logits = self.pair(torch.float32)[1]
        self.assert_greatest(per_pixel_map(logits, **sizes), self.plain(logits, sizes).resize(logits))

    @pytest.mark.parametrize(("sizes", "dtype"), CASES)
    def test_panoptic_equals_the_plain_order(self, way, sizes, dtype):
        class_logits, mask_logits = self.pair(dtype)
        segmentation, segments = panoptic_segments(
            class_logits, mask_logits, **sizes, threshold=0.3, overlap_mask_area_threshold=0.0
        )
        scores, labels = class_logits.float().softmax(-1).max(-1)
        queries = ((labels < class_logits.shape[1] - 1) & (scores > 0.3)).nonzero()[:, 0]
        logits = self.plain(mask_logits, sizes).resize(mask_logits[queries].float())
        values = scores[queries, None, None] * logits.sigmoid()
        winners, ids = values.argmax(0), segmentation.long()
        assert segmentation.is_cuda and segmentation.dtype == torch.int32
        # a segment is what one query wins, in their order
        won = [query for query in winners.unique().tolist() if (logits[query] >= 0).any()]
        assert [s["label_id"] for s in segments] == labels[queries][won].tolist()
        assert [s["area"] for s in segments] == ids.flatten().bincount(minlength=len(segments) + 1)[1:].tolist()
        of_query = torch.zeros(len(queries), dtype=torch.int64, device="cuda")
        of_query[won] = torch.arange(1, len(won) + 1, device="cuda")
        best = values.topk(2, 0).values
        clear = best[0] - best[1] > 1e-5
        assert torch.equal(ids[clear], of_query[winners][clear])

    @pytest.mark.parametrize(("sizes", "dtype"), CASES)
    @pytest.mark.parametrize("as_map", [True, False])
    def test_instances_equal_the_plain_order(self, way, sizes, as_map, dtype):
        pair = self.pair(dtype)
        options = dict(**sizes, threshold=0.2, as_map=as_map)
        result, segments = instance_segments(*pair, **options)
        with mock.patch.object(post_processing, "maps_of", self.plain_maps_of):
            expected, expected_segments = instance_segments(*pair, **options)
        assert result.is_cuda and result.dtype == expected.dtype and result.shape == expected.shape
        assert (result != expected).float().mean() < 1e-3
        assert [s["label_id"] for s in segments] == [s["label_id"] for s in expected_segments]
        for ours, others in zip(segments, expected_segments, strict=True):
            assert ours["score"] == pytest.approx(others["score"], abs=1e-4)
            assert ours["area"] == pytest.approx(others["area"], abs=5 + 1e-3 * others["area"])

    def test_instances_equal_the_cpus(self):
        pair, options = self.pair(torch.float32), dict(**self.SIZES[2], threshold=0.2, as_map=True)
        result, segments = instance_segments(*pair, **options)
        expected, expected_segments = instance_segments(*(logits.cpu() for logits in pair), **options)
        assert (result.cpu() != expected).float().mean() < 1e-3
        assert [s["label_id"] for s in segments] == [s["label_id"] for s in expected_segments]

    @pytest.mark.parametrize("sizes", SIZES[:2])
    def test_semantic_of_noise(self, sizes):
        """Every class can win everywhere."""
        class_logits, mask_logits = (torch.randn(shape, device="cuda") for shape in ((100, 151), (100, 128, 232)))
        scores = self.plain(mask_logits, sizes).semantic_scores(class_logits.softmax(-1)[:, :-1], mask_logits, "scores")
        self.assert_greatest(semantic_map(class_logits, mask_logits, **sizes), scores)

    @pytest.mark.parametrize("function", [semantic_map, panoptic_segments, instance_segments])
    def test_no_query_and_damaged_logits(self, function):
        pair, sizes = self.pair(torch.float32), self.SIZES[2]
        result = function(*(logits[:0] for logits in pair), **sizes)
        segmentation = result if function is semantic_map else result[0]
        assert segmentation.is_cuda and segmentation.shape[-2:] == sizes["target_size"] and not segmentation.any()
        pair[1][3, 4, 5] = float("nan")
        with pytest.raises(ValueError, match="1 of the .* values of masks_queries_logits are NaN or infinite"):
            function(*pair, **sizes)

    def test_memory_is_less_than_of_the_plain_order(self):
        class_logits, mask_logits = self.pair(torch.float32)
        sizes = dict(padded_size=(512, 928), valid_size=(512, 910), target_size=(2160, 3840))
        semantic_map(class_logits, mask_logits, **sizes)
        peaks = []
        for make in (
            lambda: semantic_map(class_logits, mask_logits, **sizes),
            lambda: self.plain(mask_logits, sizes).semantic_map(
                class_logits.softmax(-1)[:, :-1], mask_logits, "scores"
            ),
        ):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            make()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[0] < peaks[1] / 5
