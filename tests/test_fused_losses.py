"""The kernels of the losses in Triton's interpreter, on a CPU; on a GPU see test_gpu.py."""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from maskcls_hf.models import fused_losses, losses
from maskcls_hf.models.matching import PaddedTargets

torch.set_num_threads(1)
torch.manual_seed(0)
calls = []


def results(is_fused, logits, targets, image, segment):
    losses.can_fuse = lambda logits: is_fused
    logits = logits.clone().requires_grad_()
    both = torch.stack(losses.paired_losses(logits, targets, image, segment))
    (both * torch.linspace(1, 2, both.numel()).view_as(both)).sum().backward()
    return both.detach(), logits.grad.float()


def fail(error):
    raise error


losses.give_up = fail
image, segment = torch.tensor([0, 2, 2, 0, 2]), torch.tensor([1, 0, 2, 0, 1])
for size, cells in ((40, 51), (10, 13)), ((7, 5), (9, 8)):
    for is_index_map in (False, True):
        for valid in (None, torch.rand(3, *size) > 0.2):
            for dtype in (torch.float32, torch.bfloat16):
                maps = torch.randint(-1, 3, (3, *size), dtype=torch.int16)
                masks = maps if is_index_map else torch.rand(5, *size) > 0.6
                labels = torch.zeros(5, dtype=torch.int64)
                targets = PaddedTargets(masks, labels, [2, 0, 3], valid, is_index_map=is_index_map)
                logits = (4 * torch.randn(5, *cells)).to(dtype)
                given = logits, targets, image, segment
                for found, expected in zip(results(True, *given), results(False, *given)):
                    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
                    torch.testing.assert_close(found, expected, atol=1e-6, rtol=tolerance)
                    calls.append(found)
print("equal", len(calls))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_give_the_losses_and_gradients_of_the_operations():
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal", "32"]
