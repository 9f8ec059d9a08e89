"""Mask2Former and EoMT beside transformers', in one run on one machine:  python benchmarks/families.py

Writes families.json and .png, as speed.py does, with its options. On the same random weights and inputs: forward of
full-size networks at 640 x 640, a training step with losses on points (its peak memory in a process for each), a photo
to its panoptic map.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples import blobs, photo, predictions
from measuring import peak_memory
from speed import main
from stages import BACKBONES, DEVICE, HD, KEPT, Stage, annotation, exact, mask_logits
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    pipeline,
)
from transformers.utils import logging

from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.inference import Predictor
from maskcls_hf.models.inference_defaults import NO_CLEAN_UP

SIDE, TRAINED = 640, 512
LABELS = 133
PEAK = "--peak"  # of one contender in this process


def mask2former(backbone: str, side: int) -> Any:
    config = Mask2FormerConfig(backbone_config=BACKBONES[backbone](), num_labels=LABELS)
    return Mask2FormerForUniversalSegmentation(config)


def eomt(hidden_size: int, heads: int, side: int) -> Any:
    config = EomtConfig(
        hidden_size=hidden_size, num_attention_heads=heads, num_hidden_layers=12, patch_size=16, image_size=side,
        num_blocks=3, num_queries=200, num_labels=LABELS,
    )  # fmt: skip
    return EomtForUniversalSegmentation(config)


NETWORKS: dict[str, Callable[..., Any]] = {
    "Mask2Former R50": partial(mask2former, "R50"),
    "Mask2Former Swin-T": partial(mask2former, "Swin-T"),
    "EoMT ViT-S": partial(eomt, 384, 6),
    "EoMT ViT-B": partial(eomt, 768, 12),
}


@torch.no_grad()
def models(name: str, side: int = SIDE) -> dict[str, Any]:
    """transformers' model with random weights, none of which has a special value, and ours with the same."""
    torch.manual_seed(0)
    theirs = NETWORKS[name](side=side)
    for weights, value in theirs.named_parameters():
        if "sampling_offsets" in weights or "attention_weights" in weights:
            value.add_(0.02 * torch.randn_like(value))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = MaskClsForUniversalSegmentation.from_pretrained(folder)
    return {"transformers": theirs.to(DEVICE), "maskcls_hf": ours.to(DEVICE)}


@torch.no_grad()
def as_published(pair: dict[str, Any]) -> list[Any]:
    """Both to predict: EoMT without masks of attention."""
    theirs, ours = (model.eval() for model in pair.values())
    if hasattr(theirs, "attn_mask_probs"):
        theirs.attn_mask_probs.fill_(0)
        ours.config.mask_probabilities = [0.0] * ours.config.query_blocks
    return [theirs, ours]


def forward_stages() -> Iterator[Stage]:
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for name in NETWORKS:
        pair = models(name)
        calls = {}
        for contender, model in zip(pair, as_published(pair), strict=True):
            calls[contender] = partial(mask_logits, model, image)
        with exact():
            theirs, ours = (call() for call in calls.values())
        # A cell of masked attention that flips at a tie moves few logits a lot.
        difference = ((theirs - ours).abs().mean() / theirs.std()).item()
        assert difference < 1e-3, f"the networks differ by {difference:.1e} deviations"
        wanted = 1.2 if name.startswith("Mask2Former") else 1.0
        yield Stage(f"forward, {name}, {SIDE} x {SIDE}", calls, wanted, ratio_on_gpu=wanted)


def training_calls(name: str, contenders: list[str]) -> dict[str, Callable[[], None]]:
    """A step on two images of 16 segments, for each of the contenders."""
    rng = np.random.default_rng(0)
    batch = 2 if DEVICE == "cpu" else 8
    annotations = [annotation((TRAINED, TRAINED), 16, LABELS, rng) for _ in range(batch)]
    masks, labels = ([pair[part] for pair in annotations] for part in (0, 1))
    images = torch.randn(batch, 3, TRAINED, TRAINED, device=DEVICE)
    pair = models(name, TRAINED)

    def step(model: Any, optimizer: torch.optim.Optimizer, masks: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE != "cpu"):
            loss = model(pixel_values=images, mask_labels=masks, class_labels=labels).loss
        loss.backward()
        optimizer.step()

    calls = {}
    for contender in contenders:
        model = pair[contender].train()
        targets = [mask.float() for mask in masks] if contender == "transformers" else masks
        calls[contender] = partial(step, model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), targets)
    return calls


def peak_in_own_process(name: str, contender: str) -> int | None:
    """Bytes of a training step."""
    command = [sys.executable, __file__, PEAK, name, contender, str(torch.get_num_threads())]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    return None if answer == "None" else int(answer)


def training_stages() -> Iterator[Stage]:
    for name in ("Mask2Former R50", "EoMT ViT-S"):
        calls = training_calls(name, ["transformers", "maskcls_hf"])
        batch, where = (2, "") if DEVICE == "cpu" else (8, ", bf16")
        yield Stage(
            f"training step, {name}, {batch} x {TRAINED} x {TRAINED}{where}", calls, 1.5, 1 / 0.7, ratio_on_gpu=1.5,
            memory_ratio_on_gpu=1 / 0.7, apart=partial(peak_in_own_process, name),
        )  # fmt: skip


def end_to_end_stages() -> Iterator[Stage]:
    """A photo in, a panoptic map out; what a network with random weights finds is exchanged for 40 segments."""
    for name in ("Mask2Former R50", "EoMT ViT-S"):
        rng = np.random.default_rng(0)
        image = photo(HD, blobs(HD, KEPT, rng), rng)
        pair = as_published(models(name))
        queries = pair[1].config.num_queries
        size = {"shortest_edge": SIDE, "longest_edge": SIDE}
        grid, pads = ((SIDE // 4, SIDE // 4), dict(pad_size={"height": SIDE, "width": SIDE}))
        theirs: Any = EomtImageProcessor(size=size, do_pad=True)
        if name.startswith("Mask2Former"):
            size["longest_edge"] = 1333
            grid, pads, theirs = (SIDE // 4, 1152 // 4), {}, Mask2FormerImageProcessor(size=size)
        ours = MaskClsImageProcessor(size=size, label_ids_to_fuse=[], inference_defaults=NO_CLEAN_UP, **pads)
        logits = [part[None].to(DEVICE) for part in predictions(grid, queries, LABELS, KEPT, rng)]

        def answer_as_if_trained(model: Any, inputs: Any, found: Any, logits: Any = logits) -> None:
            found.class_queries_logits, found.masks_queries_logits = logits

        for model in pair:
            model.register_forward_hook(answer_as_if_trained)
        segmenter = pipeline(
            "image-segmentation", model=pair[0], image_processor=theirs, device=DEVICE, subtask="panoptic"
        )
        predictor = Predictor(pair[1], ours)
        calls = {
            "transformers": partial(segmenter, image, threshold=0.5),
            "maskcls_hf": partial(predictor, image, "panoptic", threshold=0.5),
        }
        note = "transformers' pipeline beside our Predictor"
        yield Stage(f"photo to panoptic map, {name}, 1080p", calls, 2, note=note, ratio_on_gpu=2)


GROUPS: dict[str, Callable[[], Iterator[Stage]]] = {
    "forward": forward_stages,
    "training": training_stages,
    "end to end": end_to_end_stages,
}

if __name__ == "__main__":
    if PEAK in sys.argv:
        name, contender, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        logging.set_verbosity_error()
        (call,) = training_calls(name, [contender]).values()
        call()  # what is set up once for all is then there
        print(peak_memory(call, DEVICE))
    else:
        main(__doc__, GROUPS, Path(__file__).stem, rounds=3)
