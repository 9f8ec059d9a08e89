"""What a CUDA device computes, beside the CPU: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor

from maskcls_hf import MaskClsCriterion, MaskClsForUniversalSegmentation
from maskcls_hf.models import fused_losses, matching
from maskcls_hf.models.contracts import PixelLogits, SegmentLogits
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
        counted = pixel_mask(sizes, padded) if with_padding else None
        if counted is not None:
            counted[0, 5:9, 5:20] = 0  # void
        config = maskcls_config(num_queries=5, **VARIANTS.get(variant, {"matching": variant}))
        layers, pixels = leaf_layers(3, queries=5, variant=variant), leaf_pixels(3)
        results = []
        for device in ("cpu", "cuda"):
            own = part(layers, pixels, slice(None)) if device == "cpu" else on_cuda(layers, pixels)
            on_device = [[tensor.to(device) for tensor in of_images] for of_images in (given, labels)]
            criterion = MaskClsCriterion(config)
            mask = None if counted is None else counted.to(device)
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
        counted = torch.ones(2, 64, 96, device="cuda")
        criterion.total(criterion(layers, masks, labels, counted)).backward()
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
            criterion.total(criterion(layers, masks, labels, counted)).backward()
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
