"""The kernels of device_maps.py, run by Triton's interpreter on a CPU, beside the plain order. Run as a process of its
own, with TRITON_INTERPRET=1: the interpreter is chosen when Triton is loaded."""

from __future__ import annotations

import torch

from maskcls_hf.models import device_maps
from maskcls_hf.models.device_maps import DeviceMaps
from maskcls_hf.models.post_processing import PlainMaps, ResizeGeometry

CASES = [  # queries, classes, by how much logits differ, sizes of logits, padded, valid, target
    (20, 40, 4, (5, 8), (20, 32), (20, 30), (33, 41)),  # up; several blocks
    (3, 70, 1, (4, 9), (16, 36), (16, 36), (16, 36)),  # nothing to resize at the end; noise
    (20, 4, 20, (9, 9), (36, 36), (33, 17), (7, 40)),  # down and up; a block of one row and column
    (1, 1, 5, (2, 3), (8, 12), (8, 12), (9, 5)),
    (3, 40, 5, (1, 1), (20, 4), (19, 3), (12, 1)),
    (20, 4, 5, (30, 12), (9, 40), (9, 40), (20, 20)),  # more cells than pixels
]


def assert_greatest(index: torch.Tensor, values: torch.Tensor) -> None:
    """Another one than the greatest only where they tie."""
    greatest, chosen = values.amax(0), values.gather(0, index.long()[None])[0]
    assert ((greatest - chosen) / greatest.abs().clamp(min=1)).max() <= 1e-5


def check(queries: int, labels: int, spread: float, *sizes: tuple[int, int], threshold: float = 0.4) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(queries, *sizes[0], generator=generator)
    class_probs = (4 * torch.randn(queries, labels + 1, generator=generator)).softmax(-1)[:, :-1]
    plain, maps = (kind(ResizeGeometry(*sizes)) for kind in (PlainMaps, DeviceMaps))
    at_target = plain.resize(logits)
    areas = (at_target >= threshold).sum((1, 2))

    scores = plain.semantic_scores(class_probs, logits, "scores")
    assert_greatest(maps.semantic_map(class_probs, logits, "scores"), scores)
    assert_greatest(maps.per_pixel_map(logits), at_target)
    query_scores = class_probs.amax(-1)
    winners, won, mask_areas = maps.assign_pixels(query_scores, logits, threshold)
    assert_greatest(winners, query_scores[:, None, None] * at_target.sigmoid())
    assert torch.equal(won, winners.flatten().bincount(minlength=queries))
    assert torch.equal(mask_areas, areas)
    found, prob_sums = maps.mask_areas(logits, threshold)
    assert torch.equal(found, areas)
    torch.testing.assert_close(prob_sums, plain.mask_areas(logits, threshold)[1], atol=1e-4, rtol=1e-5)
    drawn = maps.instance_map(logits, threshold)
    assert drawn.dtype == torch.int32 and torch.equal(drawn, plain.instance_map(logits, threshold))


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # and what is not written is NaN
    for compare, sums in device_maps.WAYS:
        device_maps.check_kernels(torch.device("cpu"), compare, sums)
    device_maps.kernels_work = lambda *_: True
    for case in CASES:
        check(*case)
